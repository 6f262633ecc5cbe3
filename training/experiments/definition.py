"""`Definition`: an experiment, read from YAML: the data, the grid of runs, how they train and how they are judged."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.task import Task, TaskError
from training.config import TrainConfig
from training.errors import UserError
from training.metrics import CONVENTIONS

BASELINE = "baseline"
NOWHERE = (Path(), Path(), Path())
"""For a configuration that is only looked at."""

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9+_.-]*$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TestPhantoms(_Part):
    """Patients that no run has seen: a collection of its own."""

    __test__ = False  # not a test, whatever pytest makes of the name

    subjects: Count
    seed: Seed


class Phantoms(_Part):
    """Synthetic patients, the same for every run of the experiment."""

    subjects: Count
    """Training patients."""
    seed: Seed
    spacing: float = Field(default=1.0, ge=0.5, le=10)
    """mm"""
    shape: tuple[Count, Count, Count] | None = None
    """Voxels; 240 x 240 x 155 mm if not given."""
    test: TestPhantoms

    @model_validator(mode="after")
    def _unseen(self) -> Phantoms:
        if self.test.seed == self.seed:
            raise ValueError("test.seed must differ from seed, or the test phantoms are the training ones")
        return self


class Source(_Part):
    """A folder of real scans, named on the command line with --data."""

    published: bool = True
    """Take the published lists and missingness tables, by the imbalances' names; else both are drawn."""
    val: Annotated[float, Field(ge=0)] | None = None
    """Where drawn: subjects left out of training, a fraction below 1 or a count."""
    test: Annotated[float, Field(gt=0)] | None = None
    """Where drawn: subjects to judge on, likewise."""

    @model_validator(mode="after")
    def _drawn(self) -> Source:
        if self.published == (self.val is not None or self.test is not None):
            raise ValueError("give either published: true, or published: false with val and test")
        if not self.published and (self.val is None or self.test is None):
            raise ValueError("val and test belong together")
        return self


class Data(_Part):
    """Where the subjects come from; exactly one of `phantom` and `source`."""

    task: str = "glioma"
    """A shipped task by name, or a YAML file (relative to the working directory)."""
    phantom: Phantoms | None = None
    source: Source | None = None

    @model_validator(mode="after")
    def _one(self) -> Data:
        if (self.phantom is None) == (self.source is None):
            raise ValueError("give one of phantom and source")
        return self


class Imbalance(_Part):
    """Missing rates under a name: a preset (`mr2468`), a published table of that name, or rates of one's own."""

    name: Name
    missing: dict[str, Annotated[float, Field(ge=0, lt=1)]] | None = None
    """By modality; none: the name is a preset's or a published table's."""


class Arm(_Part):
    """One way to train. The arm named `baseline` is what the others are compared with."""

    name: Name
    method: str = "none"
    regime: str = "idt"
    seeds: tuple[Seed, ...] | None = Field(default=None, min_length=1)
    """Only these of the experiment's seeds: a bound may do with fewer than what is compared."""

    @property
    def training(self) -> dict[str, Any]:
        """How it trains, whichever seeds it has."""
        return self.model_dump(mode="json", exclude={"seeds"})

    @property
    def complete(self) -> bool:
        """Trained on complete subjects, so the same under every imbalance."""
        return self.regime == "pdt"


class Evaluate(_Part):
    """How the trained models are judged."""

    empty: str = "published"
    subsets: tuple[str, ...] | None = None
    """Such as `flair+t2`; all of them if not given."""

    @model_validator(mode="after")
    def _known(self) -> Evaluate:
        if self.empty not in CONVENTIONS:
            raise ValueError(f"empty: {self.empty!r} is unknown: use one of {', '.join(CONVENTIONS)}")
        return self


class Definition(_Part):
    """The grid is backbones x imbalances x arms x seeds. `resolved` by one scale, if the definition has scales."""

    name: Name
    description: str = ""
    scale: str | None = None
    """The scale that the values are of."""
    data: Data
    imbalances: tuple[Imbalance, ...] = Field(min_length=1)
    backbones: tuple[str, ...] = Field(min_length=1)
    arms: tuple[Arm, ...] = Field(min_length=1)
    seeds: tuple[Seed, ...] = Field(min_length=1)
    train: dict[str, Any] = {}
    """Values of `TrainConfig`, but for those that the grid sets."""
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="before")
    @classmethod
    def _short_imbalances(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("imbalances"), list):
            given = [{"name": i} if isinstance(i, str) else i for i in values["imbalances"]]
            return values | {"imbalances": given}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Definition:
        axes: dict[str, list[str]] = {
            "arms": [arm.name.lower() for arm in self.arms],
            "imbalances": [imbalance.name.lower() for imbalance in self.imbalances],
            "backbones": list(self.backbones),
            "seeds": [str(seed) for seed in self.seeds],
        }
        for field, names in axes.items():
            twice = next((n for n in names if names.count(n) > 1), None)
            if twice is not None:
                raise ValueError(f"{field}: {twice} stands twice")
        for arm in self.arms:
            strange = [seed for seed in arm.seeds or () if seed not in self.seeds]
            if strange:
                raise ValueError(f"arms.{arm.name}.seeds: {strange[0]} is none of the experiment's seeds")
        if BASELINE not in [a.name for a in self.arms]:
            raise ValueError(f"arms: one must be named {BASELINE!r}: the others are compared with it")
        return self

    def task(self) -> Task:
        """The task of the data. Raises `UserError`."""
        try:
            return Task.load(self.data.task)
        except TaskError as error:
            raise UserError(f"data.task: {error}") from None

    def training(self) -> dict[str, Any]:
        """What every run has in common, as a cell's identity: data, training values, evaluation."""
        content = self.model_dump(mode="json")
        return {key: content[key] for key in ("data", "train", "evaluate")}

    def as_yaml(self) -> str:
        """The content of definition.yaml; `read` takes it back."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def fingerprint(content: Any) -> str:
    """A short hash of JSON content, the same for equal content."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def train_config(
    definition: Definition, backbone: str, arm: Arm, seed: int, data: Path, split: Path, out: Path
) -> TrainConfig:
    """The configuration of one run. Raises pydantic's `ValidationError`."""
    values = {
        "data": data,
        "split": split,
        "out": out,
        "name": f"{definition.name}: {backbone}, {arm.name}, seed {seed}",
        "backbone": backbone,
        "method": arm.method,
        "regime": arm.regime,
        "seed": seed,
    }
    return TrainConfig.model_validate(definition.train | values)
