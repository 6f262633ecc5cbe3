"""`Evaluation`: a checkpoint's scores on cases with labels, for every subset of modalities."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from models.card import EmptyRegion, Scores, SubsetScore
from models.predictor import Predictor
from models.task import Task, TaskError
from models.volume import Grid, Volume, VolumeError
from training import atomic
from training.errors import UserError
from training.metrics import Region, dice, hd95, mean, without_small
from training.prepare import RawCase

Subset = tuple[str, ...]

POSTPROCESSED = "_pp"
"""A region with a `min_ml` is scored twice: as segmented, and under its name with this, with what is too small gone."""


@dataclass(frozen=True)
class CaseScore:
    """One case, one subset, one region."""

    case: str
    subset: Subset
    region: str
    """The region's name, or that with `_pp`."""
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
        regions = scored_names(self.task)
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


def scored_names(task: Task) -> list[str]:
    """What is scored, in order: every region, and after it, where it has a `min_ml`, its post-processed form."""
    names = [n for r in task.regions for n in ((r.name, r.name + POSTPROCESSED) if r.min_ml else (r.name,))]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise UserError(f"task {task.name}: the name of region {twice} is taken by a region's min_ml: rename it")
    return names


def evaluate_case(
    predictor: Predictor, case: RawCase, subsets: Sequence[Subset], empty: EmptyRegion
) -> list[CaseScore]:
    """Segment one case from every subset whose modalities it has, through the same way in as `passion predict`.

    Raises `UserError` naming the case or its file if it cannot be used.
    """
    task = predictor.task
    labels_file = _labels(case)
    volumes = {name: _volume(path) for name, path in case.images.items()}
    labels = _volume(labels_file)
    try:
        classes = task.read_labels(labels.data)
    except TaskError as error:
        raise UserError(f"{labels_file}: {error}") from error
    truths = [np.isin(classes, region.labels) for region in task.regions]
    rows: list[CaseScore] = []
    for subset in subsets:
        if not set(subset) <= set(volumes):
            continue
        if not volumes[subset[0]].grid.same_as(labels.grid):
            raise UserError(f"{case.id}: its labels lie on another grid than {subset[0]}; register them")
        try:
            result = predictor.segment({name: volumes[name] for name in subset})
        except VolumeError as error:
            raise UserError(f"{case.id}: {error}") from error
        for region, truth in zip(task.regions, truths, strict=True):
            predicted = np.isin(result.classes, region.labels)
            score = _score(case.id, subset, region.name, predicted, truth, labels.grid, empty)
            rows.append(score)
            if region.min_ml:
                name = region.name + POSTPROCESSED
                kept = without_small(predicted, region.min_ml, labels.grid.voxel_ml)
                if kept is predicted:  # nothing is dropped, so all figures are the same
                    rows.append(replace(score, region=name))
                else:
                    rows.append(_score(case.id, subset, name, kept, truth, labels.grid, empty))
    return rows


def evaluate(
    predictor: Predictor,
    cases: Sequence[RawCase],
    subsets: Sequence[Subset],
    empty: EmptyRegion,
    on_case: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Every case and subset. Raises `UserError` if a case cannot be used or none has a subset's modalities."""
    scored_names(predictor.task)
    for case in cases:
        _labels(case)  # a case that cannot be scored is told before hours go into the others
    rows: list[CaseScore] = []
    for case in cases:
        rows += evaluate_case(predictor, case, subsets, empty)
        on_case()
    scored = {row.subset for row in rows}
    if not scored:
        raise UserError("no case has the modalities of any subset asked for")
    return Evaluation(predictor.task, [s for s in subsets if s in scored], empty, rows)


def _labels(case: RawCase) -> Path:
    if case.problem is not None or case.labels is None:
        raise UserError(f"{case.id}: {case.problem or 'has no labels'} (or leave it out with --only)")
    return case.labels


def _volume(path: Path) -> Volume:
    try:
        return Volume.load(path)
    except VolumeError as error:
        raise UserError(f"{path}: {error}") from error


def _score(
    case: str, subset: Subset, name: str, predicted: Region, truth: Region, grid: Grid, empty: EmptyRegion
) -> CaseScore:
    return CaseScore(
        case,
        subset,
        name,
        dice(predicted, truth, empty),
        hd95(predicted, truth, grid.zooms, empty),
        float(predicted.sum()) * grid.voxel_ml,
        float(truth.sum()) * grid.voxel_ml,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
