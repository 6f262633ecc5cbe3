"""`brain_of`: where the brain is in a scan of a head, found by deepbet (L. Fisch et al., 2024; MIT)."""

from __future__ import annotations

import hashlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from models.volume import Grid, Volume, VolumeError

WEIGHTS = {
    "model.pt": "de8ee7c69654d0dd3935dc4a5d84571d8ecf4637a6bfc01df399c4c2bc86e0fd",
    "bbox_model.pt": "39a7b2b5f799faa1391ea97bfcdc0b9299f20d84f2316a4ff8918dc4685e40aa",
}
"""SHA-256 of deepbet 1.0.2's networks. They are TorchScript, which runs what it holds: no other file is loaded."""
ORDER = ("t1", "t1ce", "flair", "t2")
"""The contrasts by how well deepbet does on them, see docs/raw.md."""
LEAST_ML, MOST_ML = 500.0, 2400.0
"""What may be a brain: beyond it something else was found."""


class NoStripperError(VolumeError):
    """There is a skull and nothing that could strip it."""


def brain_of(name: str, volume: Volume) -> npt.NDArray[np.bool_]:
    """The brain's voxels in a scan of a head, (X, Y, Z).

    Raises `NoStripperError` where deepbet is not installed, and `VolumeError` where no brain is found.
    """
    extraction = _deepbet()
    try:
        _, mask, _ = extraction.run(nib.Nifti1Image(volume.data, volume.grid.affine))
    except (AssertionError, ValueError, RuntimeError):  # its ways to say that nothing was found
        mask = None
    found = np.zeros(volume.data.shape, bool) if mask is None else np.asarray(mask.dataobj) > 0
    millilitres = float(found.sum()) * volume.grid.voxel_ml
    if not LEAST_ML <= millilitres <= MOST_ML:
        raise VolumeError(
            f"{name}: no brain was found in it ({millilitres:.0f} mL); strip the skull yourself and use preprocess none"
        )
    return found


def brought(brain: npt.NDArray[np.bool_], grid: Grid, onto: Grid) -> npt.NDArray[np.bool_]:
    """A set of voxels of `grid` on another grid of the same world."""
    matrix = np.linalg.inv(grid.affine) @ onto.affine
    shares = ndimage.affine_transform(
        brain.astype(np.float32), matrix[:3, :3], matrix[:3, 3], onto.shape, np.float32, order=1, cval=0.0
    )
    there: npt.NDArray[np.bool_] = shares > 0.5
    return there


@cache
def _deepbet() -> Any:
    """deepbet on the CPU. Raises `NoStripperError` unless it is there with the weights that it was released with."""
    spec = importlib.util.find_spec("deepbet")
    if spec is None or spec.origin is None:
        raise NoStripperError(
            "the scans show the skull, and nothing is installed that strips it: pip install 'passion-seg[strip]', or "
            "strip it yourself, or use preprocess none to have them segmented as they are"
        )
    folder = Path(spec.origin).parents[1] / "data" / "models"
    for name, known in WEIGHTS.items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != known:
            raise NoStripperError(
                f"{name} is not what deepbet 1.0.2 was released with, and is not loaded: pip install --force-reinstall "
                "--no-deps deepbet==1.0.2"
            )
    import deepbet

    return deepbet.BrainExtraction(
        no_gpu=True, model_path=str(folder / "model.pt"), bbox_model_path=str(folder / "bbox_model.pt")
    )
