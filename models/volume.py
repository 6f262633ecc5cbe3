"""`Volume`: one 3-D image and the grid that it lies on."""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.affines import voxel_sizes

Affine = npt.NDArray[np.float64]

GEOMETRY = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
SAME_GRID_MM = 1e-3


class VolumeError(ValueError):
    """An image that cannot be used. The message says what is wrong with it and what to do."""


@dataclass(frozen=True)
class Grid:
    """Where the voxels of an image are."""

    shape: tuple[int, int, int]
    affine: Affine
    """(4, 4): voxel indices to mm, world axes R, A, S."""
    header: Any
    """A NIfTI header with this geometry and nothing else: no text of the original is kept."""

    @classmethod
    def of(cls, image: Any) -> Grid:
        """The grid of a nibabel NIfTI image that is 3-D, or 4-D with one volume."""
        header = type(image.header)()
        shape = tuple(int(n) for n in image.shape[:3])
        header.set_data_shape(shape)
        for name in GEOMETRY:
            header[name] = image.header[name]
        header["pixdim"][4:] = 1
        assert len(shape) == 3
        return cls(shape, np.asarray(header.get_best_affine(), np.float64), header)

    @property
    def zooms(self) -> tuple[float, ...]:
        """mm per voxel along each axis."""
        return tuple(float(z) for z in voxel_sizes(self.affine))

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in mL."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    def same_as(self, other: Grid) -> bool:
        """Whether the voxels coincide, to a micrometre."""
        return self.shape == other.shape and np.allclose(self.affine, other.affine, rtol=0, atol=SAME_GRID_MM)

    def image(self, data: npt.NDArray[np.unsignedinteger]) -> Any:
        """A nibabel NIfTI image of `data`, in its type, on exactly this grid: affine, codes, zooms and units."""
        header = self.header.copy()
        header.set_data_dtype(data.dtype)
        kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
        return kind(data, None, header)


@dataclass(frozen=True)
class Volume:
    """An image's voxels and grid."""

    data: npt.NDArray[np.float32]
    """(X, Y, Z), finite."""
    grid: Grid

    @classmethod
    def load(cls, path: Path) -> Volume:
        """Read a NIfTI file: 3-D, or 4-D with one volume; finite. Raises `VolumeError`."""
        image = load_image(path)
        try:
            data = np.asarray(image.dataobj, dtype=np.float32).reshape(image.shape[:3])
        except (OSError, EOFError, ValueError, zlib.error, gzip.BadGzipFile) as error:
            raise VolumeError("the image data is incomplete or damaged: export the scan again") from error
        if not np.isfinite(data).all():
            raise VolumeError("the image has NaN or infinite voxels: replace them, for example by 0, before use")
        return cls(data, Grid.of(image))


def load_image(path: Path) -> Any:
    """Open a NIfTI file and check its header, without reading voxels. Raises `VolumeError`."""
    try:
        image = nib.load(path)
    except FileNotFoundError:
        raise VolumeError(f"{path} does not exist") from None
    except Exception as error:  # nibabel raises many kinds for what is no image
        raise VolumeError("not a readable NIfTI file: give a .nii or .nii.gz image") from error
    if not isinstance(image, nib.Nifti1Image):  # Nifti2Image derives from it
        raise VolumeError(f"the file is {type(image).__name__}, not NIfTI: convert it to .nii or .nii.gz")
    shape = image.shape
    if not (len(shape) == 3 or (len(shape) > 3 and set(shape[3:]) == {1})):
        raise VolumeError(f"the image has shape {shape}: give one 3-D volume per modality")
    if image.get_data_dtype().fields is not None or image.get_data_dtype().kind not in "iuf":
        raise VolumeError("the image is not a plain grey-value image (colour or complex): export grey values")
    affine = image.affine
    if affine is None or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise VolumeError("the image's affine is not invertible: its header is damaged, export the scan again")
    return image


def save_image(image: Any, path: Path) -> None:
    """Write a nibabel image to `path` (.nii or .nii.gz) whole or not at all."""
    suffix = ".nii.gz" if path.name.endswith(".nii.gz") else ".nii"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{suffix}")
    try:
        nib.save(image, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
