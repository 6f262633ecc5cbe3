"""What the service shows of its jobs and models."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from app.jobs.cards import LabelCard, ModalityCard, ModelCard, RegionCard, Scores
from app.jobs.lines import Priority
from app.jobs.record import Expectation, Failure, Job, JobState, LabelName, Preprocess
from app.web.standing import Standing

NOTICE = "Research software, not a medical device: not for diagnosis, treatment or any other clinical decision."

EXAMPLE_JOB: dict[str, JsonValue] = {
    "id": "5c1f6d3e-2f0b-4c57-9a49-0c6a1df3f1b2",
    "state": "running",
    "position": None,
    "waiting_for": None,
    "priority": "interactive",
    "stage": "segmenting",
    "percent": 41.5,
    "attempts": 1,
    "created": "2026-01-05T09:30:00Z",
    "started": "2026-01-05T09:30:01Z",
    "finished": None,
    "model": "glioma-phantom-rfnet",
    "weights_sha256": "9f2c...",
    "modalities": {"given": ["t2", "flair"], "missing": ["t1ce", "t1"]},
    "preprocess": "auto",
    "grid": "t2",
    "labels": [{"value": 0, "name": "background"}, {"value": 1, "name": "necrotic core"}],
    "volumes_ml": None,
    "expected_dice": {"dataset": "phantoms", "cases": 16, "dice": {"WT": 0.9, "TC": 0.7, "ET": 0.4}},
    "warnings": [],
    "seconds": {},
    "error": None,
    "quarantined": False,
    "links": {
        "self": "/jobs/5c1f6d3e-2f0b-4c57-9a49-0c6a1df3f1b2",
        "events": "/jobs/5c1f6d3e-2f0b-4c57-9a49-0c6a1df3f1b2/events",
        "mask": None,
        "report": None,
        "preview": None,
        "dicom_seg": None,
        "probabilities": None,
        "model": "/models/glioma-phantom-rfnet",
    },
    "notice": NOTICE,
}


class Modalities(BaseModel):
    """Which images the model had and which it did without."""

    given: list[str] = Field(
        description="In the order given; the mask lies on the grid of the first, unless another one's was asked for."
    )
    missing: list[str]


class JobLinks(BaseModel):
    """Where to go from here."""

    self: str
    events: str = Field(description="The job as server-sent events.")
    mask: str | None = Field(description="Null until the job has succeeded.")
    report: str | None = Field(description="How the mask came about. Null until the job has succeeded.")
    preview: str | None = Field(description="A picture of the mask. Null until the job has succeeded.")
    dicom_seg: str | None = Field(
        description="The mask as DICOM SEG. Null until the job has succeeded, and if the image on whose grid the mask "
        "lies was no DICOM series."
    )
    probabilities: str | None = Field(description="Null until the job has succeeded, and if they were not asked for.")
    model: str

    @classmethod
    def of(cls, job: Job) -> JobLinks:
        """What there is for a record."""
        here = f"/jobs/{job.id}"
        return cls(
            self=here,
            events=f"{here}/events",
            mask=f"{here}/mask" if job.state is JobState.SUCCEEDED else None,
            report=f"{here}/report" if job.origin else None,
            preview=f"{here}/preview.png" if job.previewed else None,
            dicom_seg=f"{here}/dicom-seg" if job.dicom_seg else None,
            probabilities=f"{here}/probabilities" if job.probability_regions else None,
            model=f"/models/{job.model}",
        )


class JobResource(BaseModel):
    """One segmentation job."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_JOB]})

    id: str
    state: JobState
    position: int | None = Field(description="While queued: 1 is next in the line of its model.")
    waiting_for: str | None = Field(description="While queued, if no worker takes such jobs: which one is missing.")
    priority: Priority = Field(description="Those that are interactive come first.")
    stage: str | None = Field(
        description="While running: starting, loading, preparing, normalising, segmenting or restoring."
    )
    percent: float = Field(ge=0, le=100)
    attempts: int
    created: datetime
    started: datetime | None
    finished: datetime | None
    model: str
    weights_sha256: str = Field(description="Of the weights that made, or will make, the mask.")
    modalities: Modalities
    preprocess: Preprocess = Field(description="Whether the images are registered and stripped first.")
    grid: str = Field(description="The modality on whose grid the mask lies.")
    labels: list[LabelName] = Field(description="What the values in the mask stand for.")
    volumes_ml: dict[str, float] | None = Field(description="Volume of each region in mL, once succeeded.")
    warnings: list[str] = Field(description="What a reader of the mask should know of it.")
    seconds: dict[str, float] = Field(description="How long each stage took, once succeeded.")
    expected_dice: Expectation | None = Field(
        description="What the model scored on its own test set with exactly these modalities. Null: never measured."
    )
    error: Failure | None
    quarantined: bool = Field(
        description="Whether it ended so many processes that no other one gets it; its files are kept for the operator."
    )
    links: JobLinks
    notice: str = NOTICE

    @classmethod
    def of(cls, job: Job, standing: Standing) -> JobResource:
        """The resource for a record."""
        return cls(
            id=job.id,
            state=job.state,
            position=standing.position,
            waiting_for=standing.waiting_for,
            priority=job.priority,
            stage=job.stage,
            percent=round(job.percent, 1),
            attempts=job.attempts,
            created=job.created,
            started=job.started,
            finished=job.finished,
            model=job.model,
            weights_sha256=job.weights_sha256,
            modalities=Modalities(given=list(job.given), missing=list(job.missing)),
            preprocess=job.preprocess,
            grid=job.reference.modality,
            labels=list(job.labels),
            volumes_ml=job.volumes_ml,
            warnings=list(job.warnings),
            seconds=job.seconds,
            expected_dice=job.expected,
            error=job.error,
            quarantined=job.quarantined,
            links=JobLinks.of(job),
        )


class JobList(BaseModel):
    """A page of the caller's jobs."""

    jobs: list[JobResource] = Field(description="The latest first.")
    next: str | None = Field(description="The next page; null on the last one.")
    notice: str = NOTICE


class ModelResource(BaseModel):
    """One served model."""

    name: str = Field(description="What the form field `model` takes.")
    default: bool = Field(description="Whether requests that name no model get this one.")
    description: str
    intended_use: str
    backbone: str
    task: str
    modalities: list[ModalityCard] = Field(description="Form fields of POST /segment; any non-empty subset will do.")
    labels: list[LabelCard]
    regions: list[RegionCard]
    scores: Scores | None = Field(description="Mean Dice per subset of modalities on the model's own test set.")
    weights_sha256: str
    links: dict[str, str]

    @classmethod
    def of(cls, name: str, card: ModelCard, default: bool) -> ModelResource:
        """The resource for a card."""
        return cls(
            name=name,
            default=default,
            description=card.description,
            intended_use=card.intended_use,
            backbone=card.backbone,
            task=card.task.name,
            modalities=list(card.task.modalities),
            labels=list(card.task.labels),
            regions=list(card.task.regions),
            scores=card.scores,
            weights_sha256=card.weights_sha256,
            links={"self": f"/models/{name}", "segment": "/segment"},
        )


class ModelList(BaseModel):
    """All served models."""

    models: list[ModelResource]
    notice: str = NOTICE


class Alive(BaseModel):
    """The process answers."""

    status: str = "alive"


class Ready(BaseModel):
    """What a job needs is there."""

    status: str = "ready"
    workers: int = Field(description="Workers that take jobs off the queue.")
    children: int = Field(description="Jobs that they can run at the same time.")
    waiting: int = Field(description="Jobs that wait.")
    models: list[str]


class Index(BaseModel):
    """Where things are."""

    service: str = "PASSION Seg"
    version: str
    links: dict[str, str]
    notice: str = NOTICE
