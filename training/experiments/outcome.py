"""`Outcome`: the scores of one comparison of arms (one backbone, one imbalance), and what the tables say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isnan
from typing import Literal

from models.task import Task
from training.experiments.collect import Results, Subset
from training.experiments.definition import BASELINE, Definition
from training.experiments.grid import Cell
from training.experiments.statistics import Comparison, compare, holm, mean, slope

Metric = Literal["dice", "hd95"]
AVERAGE = "average"
"""Over the regions of the task."""


@dataclass(frozen=True)
class Row:
    """One line of a table of differences: a subset (or None: all of them) and a region (or the average)."""

    arm: str
    subset: Subset | None
    region: str
    comparison: Comparison


class Outcome:
    """One metric of one backbone under one imbalance.

    A subject's value in a cell of a table is its mean over seeds, of what is defined; undefined values are those that
    `passion evaluate` writes as NaN. Differences are taken over the seeds that both arms have.
    """

    def __init__(self, definition: Definition, results: Results, backbone: str, imbalance: str, metric: Metric) -> None:
        self.backbone = backbone
        self.imbalance = imbalance
        self.metric = metric
        self.task: Task = definition.task()
        complete = {arm.name for arm in definition.arms if arm.complete}
        mine = {
            (c.arm, c.seed): c
            for c in results.cells()
            if c.backbone == backbone and c.imbalance == (None if c.arm in complete else imbalance)
        }
        self.arms = [a.name for a in definition.arms if any(arm == a.name for arm, _ in mine)]
        self.seeds = {arm: [s for a, s in mine if a == arm] for arm in self.arms}
        wanted = set(mine.values())
        self._values: dict[tuple[str, int, Subset, str], dict[str, float]] = {}
        for score in results.scores:
            if score.cell in wanted:
                key = (score.cell.arm, score.cell.seed, score.subset, score.region)
                self._values.setdefault(key, {})[score.case] = getattr(score, metric)
        scored = {subset for _, _, subset, _ in self._values}
        self.subsets = [s for s in self.task.subsets() if s in scored]
        self.extra = list(dict.fromkeys(r for *_, r in self._values if r not in self.regions))
        """Scored besides the task's regions: their post-processed forms."""
        self.cases = sorted({case for of_case in self._values.values() for case in of_case})
        rates = [s["rates"] for s in results.splits if s["imbalance"] == imbalance]
        self.rates = {name: mean([r[name] for r in rates]) for name in self.task.names} if rates else {}
        """Realised missing rates, mean over seeds."""

    @property
    def regions(self) -> list[str]:
        """The task's."""
        return [region.name for region in self.task.regions]

    @property
    def columns(self) -> list[str]:
        """What a table has a column for."""
        return [*self.regions, *self.extra, AVERAGE]

    @property
    def others(self) -> list[str]:
        """The arms that are compared with the baseline; none while there is no baseline."""
        return [a for a in self.arms if a != BASELINE] if BASELINE in self.arms else []

    def value(self, arm: str, subset: Subset | None, region: str, seeds: Sequence[int] | None = None) -> float:
        """What a table shows: mean over subjects; over all subsets and regions the mean of those. NaN if undefined."""
        if region == AVERAGE:
            return mean([self.value(arm, subset, r, seeds) for r in self.regions])
        if subset is None:
            return mean([self.value(arm, s, region, seeds) for s in self.subsets])
        return mean(list(self._subjects(arm, tuple(seeds or self.seeds[arm]), subset, region).values()))

    def by_seed(self, arm: str) -> list[float]:
        """The overall average of each seed."""
        return [self.value(arm, None, AVERAGE, [seed]) for seed in self.seeds[arm]]

    def defined(self, arm: str) -> float:
        """Share of the values that are defined."""
        values = [
            v
            for (a, *_, r), of_case in self._values.items()
            if a == arm and r in self.regions
            for v in of_case.values()
        ]
        return mean([float(not isnan(v)) for v in values])

    def differences(self, arm: str, subset: Subset | None, region: str) -> list[float]:
        """A value per subject: arm minus baseline; over all subsets (regions) the mean of those with both defined."""
        regions = self.regions if region == AVERAGE else [region]
        subsets = self.subsets if subset is None else [subset]
        per_cell = [self._cell_differences[arm, s, r] for s in subsets for r in regions]
        return [mean([cell.get(case, float("nan")) for cell in per_cell]) for case in self.cases]

    @cached_property
    def _cell_differences(self) -> dict[tuple[str, Subset, str], dict[str, float]]:
        found = {}
        for arm in self.others:
            seeds = tuple(s for s in self.seeds[arm] if s in self.seeds[BASELINE])
            for subset in self.subsets:
                for region in (*self.regions, *self.extra):
                    ours, theirs = (self._subjects(a, seeds, subset, region) for a in (arm, BASELINE))
                    found[arm, subset, region] = {c: ours[c] - theirs[c] for c in ours if c in theirs}
        return found

    def overall(self) -> list[Row]:
        """Every arm against the baseline over all subsets; the family is the table."""
        places = [(arm, None, region) for arm in self.others for region in self.columns]
        return self._rows(places)

    def by_subset(self, arm: str) -> list[Row]:
        """One arm against the baseline for every subset; the family is the table."""
        return self._rows([(arm, subset, region) for subset in self.subsets for region in self.columns])

    def by_modality(self) -> list[Row]:
        """Arms against the baseline for single modalities, the most often missing first; the table is the family."""
        alone = [s for s in self.subsets if len(s) == 1]
        alone.sort(key=lambda s: -self.rates.get(s[0], 0.0))
        return self._rows([(arm, subset, AVERAGE) for subset in alone for arm in self.others])

    def trend(self, arm: str) -> Comparison:
        """Slope over subjects of the single-modality difference on the missing rate: above 0 if rarer gains more."""
        alone = [s for s in self.subsets if len(s) == 1]
        if not self.rates or len(alone) != len(self.task.names):
            return compare([])
        per_modality = {s[0]: self.differences(arm, s, AVERAGE) for s in alone}
        return compare(
            [slope(self.rates, {name: v[i] for name, v in per_modality.items()}) for i in range(len(self.cases))]
        )

    def seeds_in_favour(self, arm: str) -> tuple[int, int]:
        """Seeds in which the arm's overall average is the better one, of the seeds that both have."""
        both = [s for s in self.seeds[arm] if s in self.seeds[BASELINE]]
        gains = [self.value(arm, None, AVERAGE, [s]) - self.value(BASELINE, None, AVERAGE, [s]) for s in both]
        better = sum(g > 0 if self.metric == "dice" else g < 0 for g in gains)
        return better, len(both)

    def _rows(self, places: Sequence[tuple[str, Subset | None, str]]) -> list[Row]:
        corrected = holm([compare(self.differences(*place)) for place in places])
        return [Row(*place, comparison) for place, comparison in zip(places, corrected, strict=True)]

    def _subjects(self, arm: str, seeds: tuple[int, ...], subset: Subset, region: str) -> dict[str, float]:
        """Mean over seeds by subject, where defined."""
        of_seeds = [self._values.get((arm, seed, subset, region), {}) for seed in seeds]
        means = {case: mean([v.get(case, float("nan")) for v in of_seeds]) for case in self.cases}
        return {case: value for case, value in means.items() if not isnan(value)}


def missing(definition_cells: Sequence[Cell], results: Results) -> list[Cell]:
    """Cells of the grid without a result."""
    there = set(results.cells())
    return [cell for cell in definition_cells if cell not in there]
