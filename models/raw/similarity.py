"""`similarity`: how much one image tells of another, and what a small move would change."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from models.raw.coarse import Bool, Coarse, Float
from models.volume import Affine

BINS = 32
FEWEST = 200
"""Voxels below which nothing can be said."""


def similarity(fixed: Coarse, moving: Coarse, matrix: Affine, where: Bool | None = None) -> float:
    """Mutual information over the mean of the two entropies, 0..1; `matrix` takes the fixed's mm to the moving's.

    `where`: the voxels of the fixed that count, by default all that the moving covers.
    """
    seen, there = fixed.seen_from(moving, matrix)
    if where is not None:
        there &= where
    if int(there.sum()) < FEWEST:
        return 0.0
    return _shared(fixed.data[there], seen[there])


def turn_about(
    centre: npt.NDArray[np.float64], degrees: npt.NDArray[np.float64], mm: npt.NDArray[np.float64]
) -> Affine:
    """A rotation about the world's axes, in turn, around `centre`, then a shift: (4, 4) in mm."""
    turned = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        one, two = (a for a in range(3) if a != axis)
        about = np.eye(3)
        about[one, one] = about[two, two] = np.cos(angle)
        about[one, two], about[two, one] = -np.sin(angle), np.sin(angle)
        turned = about @ turned
    matrix = np.eye(4)
    matrix[:3, :3] = turned
    matrix[:3, 3] = centre - turned @ centre + mm
    return matrix


def off_the_best(fixed: Coarse, moving: Coarse, step: float) -> npt.NDArray[np.float64]:
    """How far (3 shifts in mm, 3 turns in degrees) the best position of the moving seems to be from where its header
    has it: the vertex of a parabola through three positions `step` apart. Infinite where the middle is no top."""
    head = fixed.bright()
    centre = fixed.centre(head)
    here = similarity(fixed, moving, np.eye(4))
    off = np.zeros(6)
    for place in range(6):
        change = np.zeros(6)
        change[place] = step
        low, high = (
            similarity(fixed, moving, turn_about(centre, sign * change[3:], sign * change[:3])) for sign in (-1.0, 1.0)
        )
        curve = low + high - 2 * here
        off[place] = step * (low - high) / (2 * curve) if curve < 0 and here >= max(low, high) else np.inf
    return off


def _shared(a: Float, b: Float) -> float:
    joint = np.bincount(_levels(a) * BINS + _levels(b), minlength=BINS * BINS).reshape(BINS, BINS) / a.size
    one, two = joint.sum(1), joint.sum(0)
    of_one, of_two, of_both = _entropy(one), _entropy(two), _entropy(joint)
    return (of_one + of_two - of_both) * 2 / (of_one + of_two) if of_one + of_two > 0 else 0.0


def _levels(values: Float) -> npt.NDArray[np.intp]:
    low, high = np.quantile(values, (0.002, 0.998))
    scaled = (values - low) * (BINS / max(float(high - low), 1e-6))
    return np.asarray(np.clip(scaled, 0, BINS - 1), np.intp)


def _entropy(shares: npt.NDArray[np.float64]) -> float:
    some = shares[shares > 0]
    return float(-(some * np.log(some)).sum())
