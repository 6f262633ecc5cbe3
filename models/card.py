"""`Card`: what a checkpoint says of itself, in card.json."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.task import Task, first_problem

CARD, WEIGHTS = "card.json", "weights.safetensors"
"""The files of a checkpoint."""

PACKAGED = Path(__file__).parent / "checkpoints"
"""The folder of the checkpoints that ship with the package."""

INTENDED_USE = (
    "Research on segmentation with missing modalities. Not a medical device: not for diagnosis, treatment or any other "
    "clinical decision."
)

EmptyRegion = Literal["published", "brats", "nan"]


class CheckpointError(ValueError):
    """A folder that is no whole checkpoint. The message says what is wrong with it."""


class SubsetScore(BaseModel):
    """Mean scores of one subset of modalities over a data set's cases."""

    model_config = ConfigDict(extra="forbid")

    modalities: list[str]
    dice: dict[str, float | None]
    """By region, 0 to 1; None where no case defines it."""
    hd95: dict[str, float | None]
    """By region, mm."""


class Scores(BaseModel):
    """What `passion evaluate` measured."""

    model_config = ConfigDict(extra="forbid")

    dataset: str
    cases: int
    empty_region: EmptyRegion
    """The convention for a region that is empty in truth or prediction, see `training.metrics`."""
    subsets: list[SubsetScore]


class Card(BaseModel):
    """A checkpoint's card. Everything that serving needs to know of a model, without its weights."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    name: str
    description: str = ""
    intended_use: str = INTENDED_USE
    task: Task
    backbone: str
    width: int = Field(gt=0)
    regime: str
    """What the model was trained on, and how: see `training.config`."""
    method: str
    missing_rates: dict[str, float]
    """By modality, of the training subjects."""
    training: dict[str, Any] = {}
    """The run's record: configuration, subjects, epochs, seed, device, seconds."""
    scores: Scores | None = None
    software: dict[str, str] = {}
    weights_sha256: str = ""


def load_card(folder: Path) -> Card:
    """Read and check card.json alone. Raises `CheckpointError`."""
    try:
        return Card.model_validate_json((folder / CARD).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{folder}: no checkpoint here: cannot read {CARD} ({error.strerror})") from None
    except ValidationError as error:
        raise CheckpointError(f"{folder}/{CARD}: {first_problem(error)}") from None


def software_versions() -> dict[str, str]:
    """Versions of what computes: recorded in every card."""
    found = {"python": platform.python_version()}
    for name in ("passion-seg", "torch", "numpy", "nibabel", "scipy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
