"""`Anatomy`: the ICBM 152 2009a grey- and white-matter maps, as they come inside nilearn's wheel."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from training.errors import UserError

Floats = npt.NDArray[np.float32]

_REMEDY = "install the phantom extra: pip install 'passion-seg[phantom]'"
_MARGIN = 4  # voxels kept around the brain, so that interpolation sees the background
_SHARPEN = 1.6  # the maps average 152 people; an exponent above 1 gives back an individual's edges


@dataclass(frozen=True)
class Anatomy:
    """Maps on one grid, RAS, 1 mm, cropped to the brain.

    `brain` is 1 inside and 0 outside, softly; `grey` and `white` are probabilities; cerebrospinal fluid is what the
    two leave of the brain. `origin` is the MNI position (mm) of voxel (0, 0, 0).
    """

    brain: Floats
    grey: Floats
    white: Floats
    origin: Floats

    def sample(self, image: Floats, positions: Floats) -> Floats:
        """Linear interpolation of one map at MNI positions (3, ...) in mm; 0 outside."""
        index = positions - self.origin.reshape(-1, *[1] * (positions.ndim - 1))
        values: Floats = ndimage.map_coordinates(image, index, order=1, output=np.float32, prefilter=False)
        return values

    def tissues(self, positions: Floats) -> Floats:
        """Fractions of CSF, grey and white matter at MNI positions (3, N): float32 (3, N), summing to 1."""
        grey = self.sample(self.grey, positions)
        white = self.sample(self.white, positions)
        fluid = np.clip(1 - grey - white, 0, 1)
        fractions = np.stack([fluid, grey, white]) ** np.float32(_SHARPEN)
        fractions /= np.maximum(fractions.sum(axis=0), np.float32(1e-6))
        return fractions


@lru_cache(maxsize=4)
def load_anatomy(spacing: float = 1.0) -> Anatomy:
    """The maps, blurred to what voxels of `spacing` mm see of them. Raises `UserError` where nilearn is not there."""
    folder = _package_data()
    blur = 0.4 * max(spacing**2 - 1, 0) ** 0.5
    head = nibabel.as_closest_canonical(nibabel.load(_map_file(folder, "t1")))
    inside, found = ndimage.label(np.asarray(head.dataobj) > 0)
    largest = 1 + int(np.argmax(np.bincount(inside.ravel())[1:])) if found else 0
    brain = inside == largest
    box = tuple(
        slice(max(int(w.min()) - _MARGIN, 0), min(int(w.max()) + _MARGIN + 1, n))
        for w, n in zip(np.nonzero(brain), brain.shape, strict=True)
    )
    brain = np.pad(brain[box], _MARGIN)
    origin = np.array([s.start - _MARGIN for s in box]) + head.affine[:3, 3]

    def prepared(tissue: str) -> Floats:
        image = nibabel.as_closest_canonical(nibabel.load(_map_file(folder, tissue)))
        values = np.pad(np.asarray(image.dataobj, np.float32)[box] / 255, _MARGIN)
        return np.asarray(ndimage.gaussian_filter(values, blur) if blur else values, np.float32)

    return Anatomy(
        brain=ndimage.gaussian_filter(brain.astype(np.float32), 0.8),
        grey=prepared("gm"),
        white=prepared("wm"),
        origin=origin.astype(np.float32),
    )


def _package_data() -> Path:
    # The files alone are wanted: importing nilearn would load scikit-learn and pandas for nothing.
    spec = importlib.util.find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise UserError(f"phantoms need the ICBM 152 template of the nilearn package, which is not here: {_REMEDY}")
    return Path(spec.origin).parent / "datasets" / "data"


def _map_file(folder: Path, tissue: str) -> Path:
    files = sorted(folder.glob(f"mni_icbm152_{tissue}_tal_nlin_sym_09a*.nii.gz"))
    if not files:
        raise UserError(f"the installed nilearn ships no ICBM 152 {tissue} map at 1 mm: {_REMEDY}")
    return files[0]
