"""Dice and HD95 of one region in one case, and what they are where a region is empty or too small to count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_erosion
from scipy.spatial import KDTree

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
    """The larger of the two directed 95th percentiles of the surface distances, mm.

    The surface of a region is its voxels with one of their six neighbours outside it; beyond the volume is outside.
    A surface voxel's distance is that of its centre to the centre of the other surface's nearest voxel. Each direction
    has its own percentile, interpolated linearly. MONAI's `compute_hausdorff_distance` means the same, and a test holds
    this to it; to import it takes seconds.

    Both empty: 0 (`published`, `brats`) or NaN (`nan`). One empty: NaN, that is, left out of means (`published`,
    `nan`), or 373.13 mm (`brats`).
    """
    if not prediction.any() and not truth.any():
        return float("nan") if empty == "nan" else 0.0
    if not prediction.any() or not truth.any():
        return BRATS_WORST_MM if empty == "brats" else float("nan")
    box = _box(prediction | truth)  # ten times quicker than the whole volume; outside it there is no surface
    p, t = (_surface(region[box]) * np.asarray(spacing, np.float64) for region in (prediction, truth))
    directed = (KDTree(to, leafsize=32).query(of)[0] for of, to in ((p, t), (t, p)))
    return max(float(np.percentile(distances, 95)) for distances in directed)


def without_small(prediction: Region, min_ml: float, voxel_ml: float) -> Region:
    """The prediction, or an empty one where all of it together is under `min_ml` mL; just `min_ml` is kept.

    The published post-processing of ET has 500 voxels of 1 mm: 0.5 mL.
    """
    # An affine is float32 in its file: 500 voxels of 1 mm may come out a little under 0.5 mL.
    enough = int(prediction.sum()) * voxel_ml >= min_ml * (1 - 1e-5)
    return prediction if enough else np.zeros_like(prediction)


def _surface(region: Region) -> npt.NDArray[np.int64]:
    """(N, 3): the voxels of the surface."""
    return np.argwhere(region & ~binary_erosion(region))


def _box(region: Region) -> tuple[slice, ...]:
    """The bounding box of a region that is not empty."""
    slices = []
    for axis in range(region.ndim):
        along = np.flatnonzero(region.any(tuple(a for a in range(region.ndim) if a != axis)))
        slices.append(slice(int(along[0]), int(along[-1]) + 1))
    return tuple(slices)


def mean(values: Sequence[float]) -> float | None:
    """Mean of what is defined; None where nothing is."""
    defined = [v for v in values if not np.isnan(v)]
    return sum(defined) / len(defined) if defined else None
