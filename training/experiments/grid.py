"""`Cell`: one run of an experiment's grid."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.experiments.definition import Arm, Definition, Imbalance, fingerprint


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation. `imbalance` is None for an arm that trains on complete subjects."""

    backbone: str
    imbalance: str | None
    arm: str
    seed: int

    @property
    def id(self) -> str:
        """Name of its folder."""
        return f"{self.backbone}-{self.imbalance or 'complete'}-{self.arm}-seed{self.seed}".lower()

    def __str__(self) -> str:
        return f"{self.backbone}, {self.imbalance or 'nothing missing'}, {self.arm}, seed {self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """Its fields by name."""
        return asdict(self)


def cells(definition: Definition) -> list[Cell]:
    """Every run. Seeds outermost, so that a grid cut short has whole comparisons.

    An arm on complete subjects does not depend on the imbalance: it is trained once and stands in every table.
    """
    found: dict[Cell, None] = {}
    for seed in definition.seeds:
        for imbalance in definition.imbalances:
            for backbone in definition.backbones:
                for arm in (a for a in definition.arms if a.seeds is None or seed in a.seeds):
                    found[Cell(backbone, None if arm.complete else imbalance.name, arm.name, seed)] = None
    return list(found)


def arm_of(definition: Definition, cell: Cell) -> Arm:
    """The arm of a cell."""
    return next(a for a in definition.arms if a.name == cell.arm)


def imbalance_of(definition: Definition, cell: Cell) -> Imbalance:
    """The imbalance whose split a cell trains on; the first one's where it makes no difference."""
    return next((i for i in definition.imbalances if i.name == cell.imbalance), definition.imbalances[0])


def identity(definition: Definition, cell: Cell) -> str:
    """Hash of all that a cell's result depends on: other cells of the grid may come and go."""
    content: dict[str, Any] = definition.training() | {
        "cell": cell.as_dict(),
        "arm": arm_of(definition, cell).training,
        "imbalance": cell.imbalance and imbalance_of(definition, cell).model_dump(mode="json"),
    }
    if Path(definition.data.task).suffix:  # a file of the user's, which may change under its name
        content["task"] = definition.task().model_dump(mode="json")
    return fingerprint(content)


@dataclass(frozen=True)
class CellFolder:
    """A cell's files: run.yaml, out/ (checkpoint/, log.jsonl), evaluation/scores.csv, cell.json once it is finished."""

    path: Path

    @property
    def config(self) -> Path:
        """What `passion train` reads."""
        return self.path / "run.yaml"

    @property
    def out(self) -> Path:
        """The run folder of `passion train`."""
        return self.path / "out"

    @property
    def checkpoint(self) -> Path:
        """The trained model."""
        return self.out / "checkpoint"

    @property
    def log(self) -> Path:
        """A JSON line per epoch."""
        return self.out / "log.jsonl"

    @property
    def evaluation(self) -> Path:
        """Where `passion evaluate` writes."""
        return self.path / "evaluation"

    @property
    def scores(self) -> Path:
        """A line per case, subset and region."""
        return self.evaluation / "scores.csv"

    @property
    def record(self) -> Path:
        """Written last: what the run was and took."""
        return self.path / "cell.json"

    def output(self, stage: str) -> Path:
        """What the command of a stage printed."""
        return self.path / f"{stage}.txt"
