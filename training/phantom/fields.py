"""`SmoothField`: a random function of space, in mm, that looks the same on every grid."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

HALF_EXTENT = 130.0
"""mm: fields are defined on a cube of twice this side around the origin, which holds any brain."""

# Mean over positions of the sum of squared cubic B-spline weights is 151/315 per axis.
_UNIT = (151 / 315) ** -1.5


class SmoothField:
    """A cubic B-spline over independent normal coefficients `knot` mm apart; about zero mean, unit variance.

    Being a function of mm and not of voxels, it gives one patient the same anatomy at every spacing. Sums run in a
    fixed order without BLAS, so results do not depend on the number of threads.
    """

    def __init__(self, rng: np.random.Generator, knot: float) -> None:
        self.knot = knot
        knots = math.ceil(2 * HALF_EXTENT / knot) + 4
        self.coefficients = rng.standard_normal((knots,) * 3, dtype=np.float32) * np.float32(_UNIT)

    def on(self, x: Floats, y: Floats, z: Floats) -> Floats:
        """Values on the grid spanned by three axes of positions in mm: float32 (len(x), len(y), len(z))."""
        values = self.coefficients
        # Axis 0 last: the largest of the three sums then runs over whole contiguous slabs.
        for axis, positions in ((2, z), (1, y), (0, x)):
            values = self._along(values, positions, axis)
        return values

    def _along(self, values: Floats, positions: Floats, axis: int) -> Floats:
        where = np.clip((positions + HALF_EXTENT) / self.knot, 0, values.shape[axis] - 4.001)
        first = np.floor(where).astype(np.intp)
        t = (where - first).astype(np.float32)
        weights = ((1 - t) ** 3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6, t**3 / 6)
        shape = [1, 1, 1]
        shape[axis] = -1
        total: Floats = np.take(values, first, axis) * weights[0].reshape(shape)
        for tap in (1, 2, 3):
            total += np.take(values, first + tap, axis) * weights[tap].reshape(shape)
        return total
