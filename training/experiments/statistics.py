"""Paired comparisons over subjects, and the correction for making many of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

FEWEST = 6
"""Pairs that a test needs: with 5 the smallest two-sided p of the signed-rank test is 0.0625."""


@dataclass(frozen=True)
class Comparison:
    """Paired differences over subjects."""

    n: int
    """Subjects for whom both values are defined."""
    mean: float | None
    """Mean difference; None without a subject."""
    low: float | None
    """95 % confidence interval of the mean, by Student's t; None with fewer than `FEWEST` subjects."""
    high: float | None
    p: float | None
    """Wilcoxon's signed-rank test, two-sided; None with fewer than `FEWEST` subjects that differ."""
    p_holm: float | None = None
    """`p` after Holm's correction over its family."""


def compare(differences: Sequence[float]) -> Comparison:
    """One value per subject: the arm minus the baseline. Undefined ones (NaN) are left out.

    The test drops subjects without a difference (Wilcoxon's own rule); it is exact for up to 50 subjects without ties.
    """
    from scipy import stats

    # Rounded, so that what is equal but for the order of sums is a tie to the test.
    values = np.array([d for d in differences if not np.isnan(d)], float).round(12)
    n = len(values)
    if n == 0:
        return Comparison(0, None, None, None, None)
    mean = float(values.mean())
    if n < FEWEST:
        return Comparison(n, mean, None, None, None)
    margin = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
    differing = values[values != 0]
    p = None if len(differing) < FEWEST else float(stats.wilcoxon(differing).pvalue)
    return Comparison(n, mean, mean - margin, mean + margin, p)


def holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same with `p_holm` (Holm 1979), the sequence being the family; those without a p do not count."""
    tested = sorted((c.p, i) for i, c in enumerate(comparisons) if c.p is not None)
    corrected = list(comparisons)
    so_far = 0.0
    for rank, (p, place) in enumerate(tested):
        so_far = max(so_far, min(1.0, (len(tested) - rank) * p))
        corrected[place] = replace(comparisons[place], p_holm=so_far)
    return corrected


def slope(rates: Mapping[str, float], values: Mapping[str, float]) -> float:
    """Least-squares slope of one subject's values over the missing rates of the modalities they belong to.

    NaN where a value is not defined, or the rates are all the same.
    """
    x = np.array([rates[name] for name in rates])
    y = np.array([values.get(name, np.nan) for name in rates])
    spread = float(((x - x.mean()) ** 2).sum())
    if spread == 0:
        return float("nan")
    return float(((x - x.mean()) * (y - y.mean())).sum() / spread)


def mean(values: Sequence[float]) -> float:
    """Mean of what is defined; NaN where nothing is."""
    defined = [v for v in values if not np.isnan(v)]
    return sum(defined) / len(defined) if defined else float("nan")
