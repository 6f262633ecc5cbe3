"""`Evaluation`: a checkpoint's scores on cases with labels, for every subset of modalities."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.card import EmptyRegion, Scores, SubsetScore
from models.predictor import Predictor
from models.task import Task, TaskError
from models.volume import Volume, VolumeError
from training import atomic
from training.errors import UserError
from training.metrics import dice, hd95, mean
from training.prepare import RawCase

Subset = tuple[str, ...]


@dataclass(frozen=True)
class CaseScore:
    """One case, one subset, one region."""

    case: str
    subset: Subset
    region: str
    dice: float
    hd95: float
    """mm"""
    predicted_ml: float
    truth_ml: float


@dataclass(frozen=True)
class Evaluation:
    """All scores, and how regions that are empty were counted."""

    task: Task
    subsets: list[Subset]
    empty: EmptyRegion
    rows: list[CaseScore]

    def scores(self, dataset: str) -> Scores:
        """Means over cases, as a card holds them."""
        of: dict[tuple[Subset, str], list[CaseScore]] = {}
        for row in self.rows:
            of.setdefault((row.subset, row.region), []).append(row)
        regions = [r.name for r in self.task.regions]
        return Scores(
            dataset=dataset,
            cases=len({row.case for row in self.rows}),
            empty_region=self.empty,
            subsets=[
                SubsetScore(
                    modalities=list(subset),
                    dice={r: _rounded(mean([x.dice for x in of[subset, r]])) for r in regions},
                    hd95={r: _rounded(mean([x.hd95 for x in of[subset, r]])) for r in regions},
                )
                for subset in self.subsets
            ],
        )

    def write_csv(self, path: Path) -> None:
        """One line per case, subset and region."""
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["case", "modalities", "region", "dice", "hd95_mm", "predicted_ml", "truth_ml"])
        for r in self.rows:
            writer.writerow(
                [r.case, "+".join(r.subset), r.region]
                + [f"{v:.6g}" for v in (r.dice, r.hd95, r.predicted_ml, r.truth_ml)]
            )
        atomic.write_text(path, text.getvalue())


def evaluate_case(
    predictor: Predictor, case: RawCase, subsets: Sequence[Subset], empty: EmptyRegion
) -> list[CaseScore]:
    """Segment one case from every subset whose modalities it has, through the same way in as `passion predict`.

    Raises `UserError` naming the case if it cannot be read.
    """
    task = predictor.task
    if case.problem is not None or case.labels is None:
        raise UserError(f"{case.id}: {case.problem or 'has no labels'}")
    rows: list[CaseScore] = []
    try:
        volumes = {name: Volume.load(path) for name, path in case.images.items()}
        labels = Volume.load(case.labels)
        truth = task.read_labels(labels.data)
        for subset in subsets:
            if not set(subset) <= set(volumes):
                continue
            result = predictor.segment({name: volumes[name] for name in subset})
            if not result.grid.same_as(labels.grid):
                raise UserError(f"{case.id}: its labels lie on another grid than {subset[0]}; register them")
            for region in task.regions:
                p, t = (np.isin(classes, region.labels) for classes in (result.classes, truth))
                rows.append(
                    CaseScore(
                        case.id,
                        subset,
                        region.name,
                        dice(p, t, empty),
                        hd95(p, t, labels.grid.zooms, empty),
                        float(p.sum()) * labels.grid.voxel_ml,
                        float(t.sum()) * labels.grid.voxel_ml,
                    )
                )
    except (VolumeError, TaskError) as error:
        raise UserError(f"{case.id}: {error}") from error
    return rows


def evaluate(
    predictor: Predictor,
    cases: Sequence[RawCase],
    subsets: Sequence[Subset],
    empty: EmptyRegion,
    on_case: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Every case and subset. Raises `UserError` if no case has a subset's modalities."""
    rows: list[CaseScore] = []
    for case in cases:
        rows += evaluate_case(predictor, case, subsets, empty)
        on_case()
    scored = {row.subset for row in rows}
    if not scored:
        raise UserError("no case has the modalities of any subset asked for")
    return Evaluation(predictor.task, [s for s in subsets if s in scored], empty, rows)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
