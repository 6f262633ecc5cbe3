"""`DicomSeries`: one DICOM series, in a folder or a zip, as a volume on its own grid."""

from __future__ import annotations

import errno
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from models.series import Instance, Series, SeriesError, is_junk, quiet_pydicom
from models.volume import Grid, Volume, VolumeError

SCANNER = 1
"""NIfTI's code for the scanner's own coordinates."""
ZIP = b"PK"
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError)


def is_series(path: Path) -> bool:
    """Whether a path is a folder or a zip, and so nothing that could be a NIfTI file."""
    if path.is_dir():
        return True
    try:
        with path.open("rb") as file:
            return file.read(2) == ZIP
    except OSError:
        return False


@dataclass(frozen=True)
class DicomSeries:
    """A series whose headers make one volume of MR slices."""

    path: Path
    names: tuple[str, ...]
    """Of its files, in the folder or the zip."""
    instances: tuple[Instance, ...]
    """Of those files."""
    series: Series

    @classmethod
    def open(cls, path: Path) -> DicomSeries:
        """Read the headers. Raises `VolumeError`, which names no patient."""
        try:
            found = [(name, instance) for name, data in _files(path) if (instance := Instance.parse(data)) is not None]
            instances = tuple(instance for _, instance in found)
            return cls(path, tuple(name for name, _ in found), instances, Series.of(instances))
        except SeriesError as error:
            raise VolumeError(str(error)) from None

    def volume(self) -> Volume:
        """The slices, decoded and rescaled as their headers say. Raises `VolumeError`."""
        data = np.empty(self.series.shape, np.float32)
        ranks = {place: rank for rank, place in enumerate(self.series.order)}
        for file, dataset in enumerate(self._datasets(pixels=True)):
            instance = self.instances[file]
            frames = _pixels(dataset).reshape(len(instance.planes), instance.rows, instance.columns)
            for frame, plane in enumerate(instance.planes):
                data[:, :, ranks[file, frame]] = (frames[frame].astype(np.float64) * plane.slope + plane.intercept).T
        if not np.isfinite(data).all():
            raise VolumeError("the image has NaN or infinite voxels: export the series again")
        if data.min() == data.max():
            raise VolumeError("the image has one value in all voxels: send the image itself, or leave it out")
        return Volume(data, grid_of(self.series))

    def headers(self) -> list[Any]:
        """The files' pydicom datasets without their pixels, in the order of `instances`. They name the patient."""
        return list(self._datasets(pixels=False))

    def _datasets(self, *, pixels: bool) -> Iterator[Any]:
        pydicom = quiet_pydicom()
        wanted = set(self.names)
        for name, data in _files(self.path):
            if name in wanted:
                yield pydicom.dcmread(io.BytesIO(data), stop_before_pixels=not pixels)


def grid_of(series: Series) -> Grid:
    """The series' grid, columns x rows x slices, in the scanner's coordinates."""
    image = nib.Nifti1Image(np.broadcast_to(np.uint8(0), series.shape), series.affine)
    image.set_sform(series.affine, SCANNER)
    image.set_qform(series.affine, SCANNER)
    image.header.set_xyzt_units("mm")
    return Grid.of(image)


def _pixels(dataset: Any) -> npt.NDArray[np.generic]:
    try:
        pixels: npt.NDArray[np.generic] = dataset.pixel_array
    except MemoryError:
        raise
    except Exception:  # each decoder has errors of its own
        raise VolumeError("a slice's pixels cannot be decoded: export the series again, uncompressed") from None
    return pixels


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents, always in the same order."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path).as_posix()
            if file.is_file() and not is_junk(name):
                yield name, file.read_bytes()
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not (is_junk(member.filename) or member.is_dir()):
                    yield member.filename, archive.read(member)
    except FileNotFoundError:
        raise VolumeError(f"{path} does not exist") from None
    except (OSError, *DAMAGED) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of a place before the zip's beginning
            raise
        raise VolumeError(
            "the zip is damaged, encrypted or packed by an unknown method: zip the folder anew"
        ) from error
