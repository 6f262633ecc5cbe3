"""What the finished cells hold, gathered into the files that are kept: scores, curves, runs.

The report is made from these alone, so it can be made again where work/ is gone.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import atomic
from training.errors import UserError
from training.experiments.definition import Definition
from training.experiments.folder import CURVES, RUNS, SCORES, ResultsFolder
from training.experiments.grid import Cell, cells
from training.experiments.runner import finished
from training.missingness import MissingnessTable

Subset = tuple[str, ...]

SCORE_COLUMNS = ("backbone", "imbalance", "arm", "seed", "case", "modalities", "region", "dice", "hd95_mm")
CURVE_COLUMNS = ("backbone", "imbalance", "arm", "seed", "epoch", "modality", "sep", "dist", "beta")


@dataclass(frozen=True)
class Score:
    """One case, subset and region of one cell."""

    cell: Cell
    case: str
    subset: Subset
    region: str
    dice: float
    hd95: float
    """mm"""


@dataclass(frozen=True)
class Curve:
    """One modality in one epoch of one cell; None: the run has no such figure."""

    cell: Cell
    epoch: int
    modality: str
    sep: float | None
    """Mean loss of the separate decoder."""
    dist: float | None
    """Mean prototype distance between student and teacher."""
    beta: float | None


@dataclass(frozen=True)
class Results:
    """Everything the report is made of."""

    scores: list[Score]
    curves: list[Curve]
    runs: list[dict[str, Any]]
    """By cell: what cell.json said."""
    splits: list[dict[str, Any]]
    """By imbalance and seed: subjects, and the realised missing rates."""

    def cells(self) -> list[Cell]:
        """The cells there are results of."""
        return [_cell(run) for run in self.runs]


def collect(definition: Definition, folder: ResultsFolder) -> Results:
    """Gather the finished cells and write the three files."""
    scores: list[Score] = []
    curves: list[Curve] = []
    runs = []
    for cell in cells(definition):
        if finished(definition, folder, cell):
            files = folder.cell(cell)
            runs.append(json.loads(files.record.read_text()))
            scores += _scores_of(cell, files.scores)
            curves += _curves_of(cell, files.log)
    splits = list(_splits(definition, folder))
    results = Results(scores, curves, runs, splits)
    _write(folder.path / SCORES, SCORE_COLUMNS, (_score_row(s) for s in scores))
    _write(folder.path / CURVES, CURVE_COLUMNS, (_curve_row(c) for c in curves))
    atomic.write_text(folder.path / RUNS, json.dumps({"splits": splits, "runs": runs}, indent=1) + "\n")
    return results


def load(folder: ResultsFolder) -> Results:
    """What `collect` wrote. Raises `UserError` where it is missing or damaged."""
    try:
        record = json.loads((folder.path / RUNS).read_text())
        scores = [
            Score(
                _cell(row),
                row["case"],
                tuple(row["modalities"].split("+")),
                row["region"],
                float(row["dice"]),
                float(row["hd95_mm"]),
            )
            for row in _read(folder.path / SCORES)
        ]
        curves = [
            Curve(_cell(row), int(row["epoch"]), row["modality"], *(_number(row[k]) for k in ("sep", "dist", "beta")))
            for row in _read(folder.path / CURVES)
        ]
        return Results(scores, curves, record["runs"], record["splits"])
    except OSError as error:
        raise UserError(
            f"{folder.path}: no results to report on yet ({Path(error.filename).name} is missing)"
        ) from None
    except (ValueError, KeyError) as error:
        raise UserError(f"{folder.path}: {RUNS}, {SCORES} or {CURVES} is damaged ({error})") from None


def _cell(row: dict[str, Any]) -> Cell:
    return Cell(row["backbone"], row["imbalance"] or None, row["arm"], int(row["seed"]))


def _scores_of(cell: Cell, path: Path) -> list[Score]:
    with path.open(newline="") as file:
        return [
            Score(
                cell,
                row["case"],
                tuple(row["modalities"].split("+")),
                row["region"],
                float(row["dice"]),
                float(row["hd95_mm"]),
            )
            for row in csv.DictReader(file)
        ]


def _curves_of(cell: Cell, path: Path) -> list[Curve]:
    found = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        groups = [record.get(name) or {} for name in ("sep", "dist", "beta")]
        for modality in dict.fromkeys(name for group in groups for name in group):
            values = (group.get(modality) for group in groups)
            found.append(Curve(cell, int(record["epoch"]), modality, *values))
    return found


def _splits(definition: Definition, folder: ResultsFolder) -> Iterable[dict[str, Any]]:
    task = definition.task()
    for imbalance in definition.imbalances:
        for seed in definition.seeds:
            path = folder.split(imbalance, seed) / "missingness.csv"
            if path.is_file():
                table = MissingnessTable.read(path, task)
                rates = {name: round(rate, 4) for name, rate in table.rates().items()}
                yield {"imbalance": imbalance.name, "seed": seed, "subjects": len(table.masks), "rates": rates}


def _cell_row(cell: Cell) -> list[Any]:
    return [cell.backbone, cell.imbalance or "", cell.arm, cell.seed]


def _score_row(score: Score) -> list[Any]:
    values = [f"{v:.6g}" for v in (score.dice, score.hd95)]
    return [*_cell_row(score.cell), score.case, "+".join(score.subset), score.region, *values]


def _curve_row(curve: Curve) -> list[Any]:
    values = ["" if v is None else f"{v:.6g}" for v in (curve.sep, curve.dist, curve.beta)]
    return [*_cell_row(curve.cell), curve.epoch, curve.modality, *values]


def _write(path: Path, columns: Sequence[str], rows: Iterable[list[Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    # No time stamp: equal results, equal bytes.
    atomic.write_bytes(path, gzip.compress(text.getvalue().encode(), mtime=0))


def _read(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", newline="") as file:
        return list(csv.DictReader(file))


def _number(text: str) -> float | None:
    return float(text) if text else None
