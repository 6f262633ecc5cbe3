"""`corrected`: a scan without the slow change of brightness that its coils make (N4)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from models.raw.itk import alone
from models.volume import Volume

SHRINK = 4
ITERATIONS = (30, 20, 10)
"""Per level, the splines' knots twice as close at each."""


def corrected(volume: Volume, brain: npt.NDArray[np.bool_]) -> Volume:
    """The scan over its bias field, which is found from the voxels of `brain` and scaled to a mean of 1 there, so that
    the scan keeps its brightness. Deterministic: one thread."""
    import SimpleITK as sitk  # noqa: N813 - its documentation calls it so

    def image(data: npt.NDArray[np.generic]) -> sitk.Image:
        made = sitk.GetImageFromArray(np.ascontiguousarray(data.T))
        made.SetSpacing(volume.grid.zooms)
        return made

    where = brain & (volume.data > 0)
    if not where.any():
        return volume
    whole = image(volume.data)
    factors = [
        max(1, min(SHRINK, round(SHRINK / zoom), n // 8))
        for zoom, n in zip(volume.grid.zooms, volume.data.shape, strict=True)
    ]
    small, mask = sitk.Shrink(whole, factors), sitk.Shrink(image(where.astype(np.uint8)), factors)
    method = sitk.N4BiasFieldCorrectionImageFilter()
    method.SetMaximumNumberOfIterations(ITERATIONS)
    with alone():
        method.Execute(small, mask)
        field = np.exp(sitk.GetArrayFromImage(method.GetLogBiasFieldAsImage(whole)).T)
    field /= field[where].mean()
    return replace(volume, data=np.asarray(volume.data / field, np.float32))
