"""`Job`: the record of one segmentation, from the accepted upload to its end."""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.jobs.lines import Needs, Priority


class JobState(StrEnum):
    """Where a job is. It only moves downwards in this list, but for a lost worker's job, which is started again."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether nothing will change any more."""
        return self not in {JobState.QUEUED, JobState.RUNNING}


class _Record(BaseModel):
    # `ignore`: a record written by a newer version must stay readable for an older one during an upgrade.
    model_config = ConfigDict(frozen=True, extra="ignore")


NIFTI_NAME, DICOM_NAME = ".nii.gz", ".zip"
"""What the names of files on the store end in: of a volume, of a DICOM series."""


class InputFile(_Record):
    """One uploaded image: which modality it is and what it is called on the store (never what the sender called it)."""

    modality: str
    filename: str

    @property
    def is_dicom(self) -> bool:
        """Whether it is a zip of a DICOM series rather than a NIfTI file."""
        return self.filename.endswith(DICOM_NAME)


FailureKind = Literal[
    "images", "model", "time-limit", "worker-lost", "out-of-memory", "store-full", "store-away", "no-worker", "internal"
]


class Failure(_Record):
    """Why a job failed, in words for its sender."""

    title: str
    detail: str
    kind: FailureKind = "internal"
    """For programs and for counting."""
    reference: str | None = None
    """Stands beside the full story in the worker's log, for failures that are ours and not the input's."""


class LabelName(_Record):
    """What one value in the mask stands for."""

    value: int
    name: str


class Expectation(_Record):
    """What the model scored on its own test set when it was given exactly this job's modalities."""

    dataset: str
    cases: int
    dice: dict[str, float | None]
    """Mean Dice per region, 0..1; None where it is undefined."""


class MaskGrid(_Record):
    """Where the voxels of a mask are: the grid of the first image given."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    axes: str
    """The direction in which each axis grows, of R/L, A/P and S/I; the closest ones where the scan is oblique."""
    voxel_ml: float


class Origin(_Record):
    """How a mask came about, as its worker knew it."""

    software: dict[str, str]
    """Versions in the worker, by package."""
    trained_with: dict[str, str]
    """Versions that trained the model, as its card has them."""
    card_sha256: str
    """Of the model's card.json."""
    backbone: str
    task: str
    regions: dict[str, tuple[int, ...]]
    """The values in the mask that each region is the union of."""
    grid: MaskGrid


Preprocess = Literal["auto", "none", "raw"]

ID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
Percent = Annotated[float, Field(ge=0, le=100)]


def now() -> datetime:
    """The present, with its time zone."""
    return datetime.now(UTC)


def new_id() -> str:
    """A job id: 122 random bits, so that nobody guesses another's."""
    return str(uuid.uuid4())


def is_id(text: str) -> bool:
    """Whether a text has the form of an id, and so holds nothing else, such as a name."""
    return ID.fullmatch(text) is not None


class Job(_Record):
    """One segmentation. Immutable: `JobStore` replaces it as a whole, or not at all."""

    id: str
    state: JobState = JobState.QUEUED
    model: str
    weights_sha256: str = ""
    """Of the weights that the model's card named when the job was accepted, then of those that made the mask."""
    inputs: tuple[InputFile, ...] = Field(min_length=1)
    """In the order given: the mask lies on the grid of the first, unless `grid` names another."""
    preprocess: Preprocess = "auto"
    """Whether the images are registered and stripped first: `auto` where they need it, `none` never, `raw` always."""
    grid: str = ""
    """The modality on whose grid the mask is to lie; empty: the first given."""
    needs: Needs = "any"
    """The kind of device that is to compute it."""
    priority: Priority = "interactive"
    missing: tuple[str, ...] = ()
    labels: tuple[LabelName, ...] = ()
    label_values: dict[str, int] = Field(default_factory=dict)
    """What the mask is to hold for which label, by name, whatever the model's card says; `labels` has it already."""
    expected: Expectation | None = None
    probabilities: bool = False
    """Whether its sender wants the regions' probabilities too."""
    owner: str = ""
    """Id of the key that sent it; only that key sees the job. Empty where the service asks for no keys."""
    fingerprint: str = ""
    """SHA-256 of the model's name, the options and what was sent, so that a repeated request is told from another."""
    idempotency: str = ""
    """SHA-256 of the sender's Idempotency-Key, if there was one."""

    trace: str = ""
    """W3C traceparent of the request that sent it, where traces are collected."""

    created: datetime = Field(default_factory=now)
    queued: datetime = Field(default_factory=now)
    """When it last came into the queue: at first, and again when its worker was lost."""
    started: datetime | None = None
    finished: datetime | None = None
    attempts: int = 0
    run: str = ""
    """Names the present attempt, and its mask on the store: a worker that was taken for lost can write neither into its
    successor's record nor over its result."""
    worker: str = ""
    """Who works, or has worked last, on the job."""
    stage: str | None = None
    percent: Percent = 0.0

    volumes_ml: dict[str, float] | None = None
    origin: Origin | None = None
    """Once succeeded. None then, too, if it could not be told."""
    previewed: bool = False
    """Whether there is a picture of the mask."""
    dicom_seg: bool = False
    """Whether the mask is there as DICOM SEG too."""
    probability_regions: tuple[str, ...] = ()
    """The regions whose probabilities are on the store, in the order of their files."""
    warnings: tuple[str, ...] = ()
    """What its reader should know of the mask; until it has succeeded, of what was sent."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """How long each stage took, in the order in which they came."""
    error: Failure | None = None
    quarantined: bool = False
    """Its files are kept for the operator to look at, and no worker is given them again: they ended too many."""

    @property
    def given(self) -> tuple[str, ...]:
        """Canonical names of the modalities that were sent, in the order given."""
        return tuple(item.modality for item in self.inputs)

    @property
    def reference(self) -> InputFile:
        """The image on whose grid the mask lies."""
        return next((item for item in self.inputs if item.modality == self.grid), self.inputs[0])
