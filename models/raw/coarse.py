"""`Coarse`: a volume in few voxels, for questions that need no more."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from nibabel.affines import voxel_sizes
from scipy import ndimage

from models.volume import Affine, Volume

Float = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

DARKEST = 0.12
"""Share of the bright tissue's grey value below which a voxel is air or bone."""


@dataclass(frozen=True)
class Coarse:
    """Means over blocks of a volume's voxels."""

    data: Float
    """(X, Y, Z)."""
    affine: Affine
    """(4, 4): voxel indices to mm, as the volume's."""

    @classmethod
    def of(cls, volume: Volume, mm: float) -> Coarse:
        """Blocks of about `mm` along each axis; an axis whose voxels are as large already stays as it is."""
        zooms = voxel_sizes(volume.grid.affine)
        factors = [max(1, min(round(mm / z), n)) for z, n in zip(zooms, volume.data.shape, strict=True)]
        kept = tuple(slice(n // f * f) for n, f in zip(volume.data.shape, factors, strict=True))
        data = volume.data[kept]
        for axis, factor in enumerate(factors):
            if factor > 1:
                shape = (*data.shape[:axis], data.shape[axis] // factor, factor, *data.shape[axis + 1 :])
                data = data.reshape(shape).mean(axis + 1, dtype=np.float32)
        step = np.diag([*factors, 1.0])
        step[:3, 3] = (np.array(factors) - 1) / 2
        return cls(np.asarray(data, np.float32), volume.grid.affine @ step)

    @property
    def zooms(self) -> tuple[float, float, float]:
        """mm per voxel along each axis."""
        x, y, z = (float(v) for v in voxel_sizes(self.affine))
        return x, y, z

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in mL."""
        return float(np.prod(self.zooms)) / 1000

    def bright(self) -> Bool:
        """Where there is tissue rather than air: the largest connected part, its holes filled."""
        positive = self.data[self.data > 0]
        if not positive.size:
            return np.zeros(self.data.shape, bool)
        tissue = self.data > DARKEST * np.quantile(positive, 0.98)
        parts, count = ndimage.label(tissue)
        if count > 1:
            tissue = parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
        filled: Bool = ndimage.binary_fill_holes(tissue)
        return filled

    def centre(self, where: Bool) -> npt.NDArray[np.float64]:
        """World position (mm) of the middle of a set of voxels."""
        index = np.array(ndimage.center_of_mass(where))
        middle: npt.NDArray[np.float64] = self.affine[:3, :3] @ index + self.affine[:3, 3]
        return middle

    def corners(self, where: Bool) -> npt.NDArray[np.float64]:
        """World positions (8, 3) in mm of the corners of a set's box."""
        found = np.argwhere(where)
        spans = np.stack([found.min(0), found.max(0)], axis=1)
        index = np.array(np.meshgrid(*spans)).reshape(3, -1).T
        places: npt.NDArray[np.float64] = index @ self.affine[:3, :3].T + self.affine[:3, 3]
        return places

    def seen_from(self, other: Coarse, matrix: Affine) -> tuple[Float, Bool]:
        """`other` on this grid, linearly, and where it has voxels; `matrix` takes this world's mm to the other's."""
        to_other = np.linalg.inv(other.affine) @ matrix @ self.affine
        turn, shift = to_other[:3, :3], to_other[:3, 3]
        shape = self.data.shape
        values = ndimage.affine_transform(other.data, turn, shift, shape, np.float32, order=1, mode="nearest")
        there = np.ones(shape, bool)
        i, j, k = np.ogrid[tuple(slice(n) for n in shape)]
        for (a, b, c), offset, size in zip(turn, shift, other.data.shape, strict=True):
            place = a * i + b * j + c * k + offset
            there &= (place >= -0.5) & (place <= size - 0.5)
        return values, there
