"""The tables of a report, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from math import isnan
from statistics import stdev
from typing import Any

from training.experiments.definition import BASELINE
from training.experiments.outcome import AVERAGE, Outcome, Row
from training.experiments.statistics import Comparison

TITLES = {"dice": "Dice", "hd95": "HD95 (mm)"}
WIDE = 3
"""Arms that a table has room for beside one another, each with all regions."""
CSV_COLUMNS = (
    *("metric", "backbone", "imbalance", "arm", "seeds", "modalities", "region", "mean"),
    *("difference", "low", "high", "subjects", "p", "p_holm"),
)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are flush left."""
    lines = [header, ["---" if i < left else "--:" for i in range(len(header))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def per_subset(outcome: Outcome) -> str:
    """The paper's table: a line per subset, every region of every arm, and the average over the subsets.

    With many arms, a table per region: one would be too wide to read.
    """
    columns = outcome.columns
    groups = [columns] if len(outcome.arms) <= WIDE else [[column] for column in columns]
    return "\n".join(_per_subset(outcome, group) for group in groups)


def differences_per_subset(outcome: Outcome, arm: str) -> str:
    """One arm minus the baseline, with interval and corrected p, a line per subset."""
    by_place = {(row.subset, row.region): row.comparison for row in outcome.by_subset(arm)}
    rows = [
        [*_dots(outcome, subset), *(difference(outcome, by_place[subset, region]) for region in outcome.columns)]
        for subset in outcome.subsets
    ]
    return markdown([*outcome.task.names, *outcome.columns], rows, left=0)


def overall(outcome: Outcome) -> str:
    """A line per arm: the means over all subsets, and below each region the difference to the baseline."""
    compared = {(row.arm, row.region): row.comparison for row in outcome.overall()}
    rows = []
    for arm in outcome.arms:
        seeds = outcome.by_seed(arm)
        spread = number(outcome, stdev(seeds)) if len(seeds) > 1 else "-"
        rows.append(
            [arm, str(len(seeds)), *(number(outcome, outcome.value(arm, None, r)) for r in outcome.columns), spread]
        )
    for arm in outcome.others:
        better, of = outcome.seeds_in_favour(arm)
        cells = [difference(outcome, compared[arm, region]) for region in outcome.columns]
        rows.append([f"{arm} - {BASELINE}", f"better in {better} of {of}", *cells, ""])
    return markdown(["", "seeds", *outcome.columns, "SD over seeds"], rows)


def per_modality(outcome: Outcome) -> str:
    """Single modalities, the most often missing first: every arm's average, and the differences to the baseline."""
    found: dict[str, dict[str, Comparison]] = {}
    for row in outcome.by_modality():
        assert row.subset is not None
        found.setdefault(row.subset[0], {})[row.arm] = row.comparison
    header = ["only", "missing rate", *outcome.arms, *(f"{arm} - {BASELINE}" for arm in outcome.others)]
    rows = []
    for name in sorted(outcome.rates or outcome.task.names, key=lambda n: -outcome.rates.get(n, 0.0)):
        if (name,) not in outcome.subsets:
            continue
        means = [number(outcome, outcome.value(arm, (name,), AVERAGE)) for arm in outcome.arms]
        gains = [difference(outcome, found[name][arm]) for arm in outcome.others]
        rows.append([name, f"{outcome.rates[name]:.3f}" if outcome.rates else "-", *means, *gains])
    trends = [difference(outcome, outcome.trend(arm)) for arm in outcome.others]
    rows.append(["slope over the missing rate", "", *[""] * len(outcome.arms), *trends])
    return markdown(header, rows)


def csv_text(outcomes: Sequence[Outcome]) -> str:
    """Every figure of every table, a line each; `all` stands for the average over the subsets."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(CSV_COLUMNS)
    for outcome in outcomes:
        compared: dict[tuple[str, Any, str], Row] = {(r.arm, r.subset, r.region): r for r in outcome.overall()}
        for arm in outcome.others:
            compared |= {(r.arm, r.subset, r.region): r for r in outcome.by_subset(arm)}
        for arm in outcome.arms:
            for subset in [*outcome.subsets, None]:
                for region in outcome.columns:
                    row = compared.get((arm, subset, region))
                    c = row.comparison if row else None
                    figures = [c.mean, c.low, c.high, c.n, c.p, c.p_holm] if c else [None] * 6
                    value = outcome.value(arm, subset, region)
                    writer.writerow(
                        [
                            *(outcome.metric, outcome.backbone, outcome.imbalance, arm),
                            *(len(outcome.seeds[arm]), "+".join(subset) if subset else "all", region),
                            *(_plain(v) for v in (value, *figures)),
                        ]
                    )
    return text.getvalue()


def number(outcome: Outcome, value: float) -> str:
    """A mean as a table shows it."""
    if isnan(value):
        return "-"
    return f"{value:.3f}" if outcome.metric == "dice" else f"{value:.1f}"


def difference(outcome: Outcome, comparison: Comparison) -> str:
    """A difference with its interval and corrected p, as a table shows it; bold where p < 0.05."""
    if comparison.mean is None:
        return "-"
    digits = 3 if outcome.metric == "dice" else 1
    shown = f"{comparison.mean:+.{digits}f}"
    if comparison.low is None or comparison.high is None:
        return shown
    p = comparison.p_holm if comparison.p_holm is not None else comparison.p
    if p is not None and p < 0.05:
        shown = f"**{shown}**"
    said = "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"
    return f"{shown} [{comparison.low:+.{digits}f}, {comparison.high:+.{digits}f}] p {said}"


def _per_subset(outcome: Outcome, columns: Sequence[str]) -> str:
    header = [*outcome.task.names, *(f"{region} {arm}" for region in columns for arm in outcome.arms)]
    rows = []
    for subset in [*outcome.subsets, None]:
        dots = _dots(outcome, subset) if subset else ["all", *[""] * (len(outcome.task.names) - 1)]
        values = [number(outcome, outcome.value(a, subset, r)) for r in columns for a in outcome.arms]
        rows.append([*dots, *(values if subset else [f"**{v}**" for v in values])])
    return markdown(header, rows, left=0)


def _dots(outcome: Outcome, subset: Sequence[str]) -> list[str]:
    return ["●" if name in subset else "○" for name in outcome.task.names]


def _plain(value: float | None) -> str:
    return "" if value is None or isnan(value) else f"{value:.6g}"
