"""`Card`: what a checkpoint says of itself, in card.json."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from models.task import Task

INTENDED_USE = (
    "Research on segmentation with missing modalities. Not a medical device: not for diagnosis, treatment or any other "
    "clinical decision."
)

EmptyRegion = Literal["published", "brats", "nan"]


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


def software_versions() -> dict[str, str]:
    """Versions of what computes: recorded in every card."""
    found = {"python": platform.python_version()}
    for name in ("passion-seg", "torch", "monai", "numpy", "nibabel", "scipy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
