"""Dice and HD95 of one region in one case, and what they are where a region is empty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from monai.metrics import compute_hausdorff_distance

from models.card import EmptyRegion

Region = npt.NDArray[np.bool_]

CONVENTIONS: tuple[EmptyRegion, ...] = get_args(EmptyRegion)
BRATS_WORST_MM = 373.13
"""The BraTS challenges' distance for a region missed or invented: the diagonal of their 240 x 240 x 155 grid."""


def dice(prediction: Region, truth: Region, empty: EmptyRegion = "published") -> float:
    """2 |P and T| / (|P| + |T|).

    Both empty: 1 (`published`, `brats`) or NaN (`nan`, also where only the truth is empty). One empty: 0.
    """
    total = int(prediction.sum()) + int(truth.sum())
    if empty == "nan" and not truth.any():
        return float("nan")
    if total == 0:
        return 1.0
    return 2.0 * int((prediction & truth).sum()) / total


def hd95(prediction: Region, truth: Region, spacing: Sequence[float], empty: EmptyRegion = "published") -> float:
    """The larger of the two 95th percentiles of the surface distances, mm (MONAI's definition).

    Both empty: 0 (`published`, `brats`) or NaN (`nan`). One empty: NaN, that is, left out of means (`published`,
    `nan`), or 373.13 mm (`brats`).
    """
    if not prediction.any() and not truth.any():
        return float("nan") if empty == "nan" else 0.0
    if not prediction.any() or not truth.any():
        return BRATS_WORST_MM if empty == "brats" else float("nan")
    both = np.argwhere(prediction | truth)
    low, high = np.maximum(both.min(0) - 1, 0), both.max(0) + 2  # far quicker than the whole volume, same surfaces
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    p, t = (torch.from_numpy(np.ascontiguousarray(r[box]))[None, None] for r in (prediction, truth))
    distance = compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=list(spacing))
    return float(distance.item())


def mean(values: Sequence[float]) -> float | None:
    """Mean of what is defined; None where nothing is."""
    defined = [v for v in values if not np.isnan(v)]
    return sum(defined) / len(defined) if defined else None
