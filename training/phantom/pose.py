"""`Pose`: where a template point lies in one patient, and where the patient lies in the scanner's grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.phantom.anatomy import Anatomy
from training.phantom.fields import HALF_EXTENT, SmoothField

Floats = npt.NDArray[np.float32]
Axes = tuple[Floats, Floats, Floats]

_CENTRE = np.array([0.0, -18.0, 6.0], np.float32)  # MNI mm: about the middle of the brain's box
_WIDE, _NARROW = 42.0, 17.0  # mm between knots: the shape of the head, the course of the gyri
_WIDE_MM, _NARROW_MM = 3.2, 1.1  # standard deviation of the displacement
_COARSE = 4.0  # mm: grid on which the brain's extent is found


@dataclass(frozen=True)
class Swelling:
    """Tissue around `centre` (mm, patient) spread by a growing tumour: stretched by 1 / (1 - push) at the centre."""

    centre: Floats
    push: float
    reach: float
    """mm, standard deviation of the Gaussian the push falls off with."""


class Pose:
    """One patient's anatomy: affine change of size and attitude, then a smooth deformation.

    Patient coordinates are mm along the grid's world axes (RAS) around the middle of the head.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        pitch, roll, yaw = np.radians(rng.normal(0, (3.0, 2.0, 2.5)))
        size = 0.935 * np.exp(rng.normal(0, 0.025)) * np.exp(rng.normal(0, 0.018, 3))
        self._inverse = np.linalg.inv(_rotation(pitch, roll, yaw) * size).astype(np.float32)
        self._shift = rng.uniform(-1, 1, 3).astype(np.float32)
        self._wide = [SmoothField(rng, _WIDE) for _ in range(3)]
        self._narrow = [SmoothField(rng, _NARROW) for _ in range(3)]

    def to_template(self, axes: Axes) -> Floats:
        """MNI positions (3, X, Y, Z) of the grid of patient positions spanned by three axes in mm."""
        moved = [
            position + np.float32(_WIDE_MM) * wide.on(*axes) + np.float32(_NARROW_MM) * narrow.on(*axes)
            for position, wide, narrow in zip(
                np.meshgrid(*axes, indexing="ij", sparse=True), self._wide, self._narrow, strict=True
            )
        ]
        # Row by row, not as a matrix product: the sum then has one order on every machine and thread count.
        turned: Floats = np.stack([r[0] * moved[0] + r[1] * moved[1] + r[2] * moved[2] for r in self._inverse])
        turned += _CENTRE.reshape(3, 1, 1, 1)
        return turned

    def swell(self, positions: Floats, axes_mm: Floats, swelling: Swelling) -> Floats:
        """Template positions (3, N) of patient points `axes_mm` (3, N) once the tumour has pushed tissue aside."""
        offset = axes_mm - swelling.centre[:, None]
        fall = np.float32(swelling.push) * np.exp(-(offset**2).sum(axis=0) / np.float32(2 * swelling.reach**2))
        pulled = offset * fall
        turned: Floats = np.stack([r[0] * pulled[0] + r[1] * pulled[1] + r[2] * pulled[2] for r in self._inverse])
        return np.subtract(positions, turned, out=turned)

    def extent(self, anatomy: Anatomy) -> tuple[Floats, Floats]:
        """Lowest and highest patient coordinate (mm) of a box that holds the brain."""
        axis = np.arange(-HALF_EXTENT, HALF_EXTENT + 1, _COARSE, dtype=np.float32)
        brain = np.argwhere(anatomy.sample(anatomy.brain, self.to_template((axis, axis, axis))) > 0.5)
        return axis[brain.min(axis=0)] - np.float32(_COARSE), axis[brain.max(axis=0)] + np.float32(_COARSE)

    def place(self, low: Floats, high: Floats, field_of_view: Floats) -> tuple[float, Floats]:
        """How to put the patient into a grid: `(shrink, offset)`, grid mm = shrink * patient mm + offset.

        A field of view smaller than the brain shrinks the whole patient into it; a larger one leaves its size alone.
        """
        shrink = float(min(1.0, (field_of_view / (high - low)).min()))
        free = np.maximum(field_of_view - shrink * (high - low), 0) / 2
        offset = field_of_view / 2 - shrink * (low + high) / 2 + self._shift * np.clip(free, 0, 6)
        return shrink, offset.astype(np.float32)


def _rotation(pitch: float, roll: float, yaw: float) -> npt.NDArray[np.float64]:
    (cx, cy, cz), (sx, sy, sz) = np.cos([pitch, roll, yaw]), np.sin([pitch, roll, yaw])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    turned: npt.NDArray[np.float64] = about_z @ about_y @ about_x
    return turned
