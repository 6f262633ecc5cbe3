"""`ScanHeader`: what an uploaded volume's NIfTI header says, once all of it makes sense."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import numpy.typing as npt

from app.jobs.settings import Settings

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Header

REWRITE = "Write the file again with a NIfTI tool."
NIFTI1, NIFTI2 = 348, 540
SINGLE_FILE = {b"n+1\0": NIFTI1, b"n+2\0": NIFTI2}
TWO_FILES = {b"ni1\0", b"ni2\0"}
READABLE = {"i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"}
MAX_HEADER = 16 << 20
"""Bytes before the first voxel, header extensions included. Real ones hold a few kilobytes."""
PLACES = (
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z"),
)
"""The fields of the two affines; pixdim and the codes aside."""

QUIET = logging.getLogger("app.jobs.scan.quiet")
QUIET.disabled = True  # nibabel's complaints quote the header


class ScanError(Exception):
    """A volume that will not do: `kind` for programs, `detail` and `remedy` for people."""

    def __init__(self, kind: str, detail: str, remedy: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.remedy = remedy


def size_of(head: bytes) -> int | None:
    """Bytes of the header that starts with these (at least 4), by its first word; None if it is none of NIfTI's."""
    if len(head) < 4:
        return None
    words = (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big"))
    return next((size for size in (NIFTI1, NIFTI2) if size in words), None)


@dataclass(frozen=True)
class ScanHeader:
    """The header's fields that voxels and geometry need."""

    nifti: Nifti1Header
    """As nibabel mends it on reading, NIfTI-1 or -2, in the file's byte order."""
    shape: tuple[int, int, int]
    affine: npt.NDArray[np.float64]
    """Voxel to world (mm, RAS+), 4 x 4."""
    dtype: np.dtype[np.generic]
    slope: float
    inter: float
    offset: int
    """The byte at which voxels start."""

    @classmethod
    def parse(cls, head: bytes, limits: Settings) -> Self:
        """From the 348 or 540 bytes of a header. Raises `ScanError` for what no worker could use."""
        nifti = _nifti(head)
        shape = _shape(nifti, limits)
        dtype = _dtype(nifti)
        slope, inter = _scaling(nifti)
        offset = _offset(nifti, len(head))
        _finite(nifti)
        with np.errstate(all="ignore"):  # fields at the ends of their range; results are checked
            _mend(nifti)
            affine = _affine(nifti, limits)
        return cls(nifti, shape, affine, dtype, slope, inter, offset)

    @property
    def voxel_bytes(self) -> int:
        """Bytes of all voxels."""
        x, y, z = self.shape
        return x * y * z * self.dtype.itemsize

    @property
    def byte_order(self) -> Literal["little", "big"]:
        """Of numbers in the file."""
        return "little" if self.nifti.endianness == "<" else "big"


def _nifti(head: bytes) -> Nifti1Header:
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    word = head[344:348] if len(head) == NIFTI1 else head[4:8]
    if word in TWO_FILES:
        raise ScanError(
            "two-files", "this is the header of a .hdr/.img pair", "Convert the pair to one .nii or .nii.gz file."
        )
    if SINGLE_FILE.get(word) != len(head):
        raise ScanError(
            "not-nifti", "the header lacks NIfTI's magic (an Analyze file?)", "Convert the file to .nii or .nii.gz."
        )
    kind = Nifti1Header if len(head) == NIFTI1 else Nifti2Header
    header: Nifti1Header = kind.from_fileobj(io.BytesIO(head), check=False)
    return header


def _offset(header: Nifti1Header, consumed: int) -> int:
    """The byte at which voxels start."""
    offset = float(header["vox_offset"])
    # Nor is NaN in this range. 4 bytes say whether extensions follow the header.
    if not consumed + 4 <= offset <= MAX_HEADER or not offset.is_integer():
        raise ScanError("bad-header", f"the header says that voxels start at byte {offset:g}", REWRITE)
    return int(offset)


def _finite(header: Nifti1Header) -> None:
    """Turn away an orientation that is no number, also where another one would be used instead of it."""
    pixdim = header["pixdim"][: int(header["dim"][0]) + 1]
    if not all(np.isfinite(values).all() for values in (pixdim, *(header[name] for name in PLACES))):
        raise _bad_affine("the header's orientation (affine) or spacing has values that are not finite")
    if float(pixdim[0]) not in (-1.0, 0.0, 1.0):  # 0 is read as 1, as the standard has it
        raise _bad_affine("the header's handedness (pixdim[0]) is neither 1 nor -1")


def _mend(header: Nifti1Header) -> None:
    """Do to the header what nibabel does on reading, in the worker; turn away what it would refuse there."""
    from nibabel.spatialimages import HeaderDataError

    try:
        header.check_fix(logger=QUIET)
    except HeaderDataError as error:
        raise ScanError("bad-header", "the header contradicts itself", REWRITE) from error


def _shape(header: Nifti1Header, limits: Settings) -> tuple[int, int, int]:
    dims = [int(n) for n in header["dim"]]
    if not 1 <= dims[0] <= 7 or any(n < 1 for n in dims[1 : dims[0] + 1]):
        raise ScanError("bad-header", "the header's dimensions make no sense", REWRITE)
    shape = dims[1 : dims[0] + 1]
    if len(shape) == 4 and shape[3] == 1:
        shape = shape[:3]
    if len(shape) != 3:
        text = " x ".join(map(str, shape))
        raise ScanError(
            "not-3d",
            f"the image is {text}, not one 3-D volume",
            "Send one volume per field: split a series, stack slices.",
        )
    found = shape[0], shape[1], shape[2]
    check_voxels(found, limits)
    return found


def _affine(header: Nifti1Header, limits: Settings) -> npt.NDArray[np.float64]:
    from nibabel.spatialimages import HeaderDataError

    try:
        header.get_qform(coded=True)  # used or not, the mask will carry it
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
        raise _bad_affine("the header's orientation cannot be read") from error
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise _bad_affine("the header's orientation (affine) has values that are not finite")
    spacing = check_spacing(affine, limits)
    # 1 for right angles, 0 for axes that fall into one plane. Real acquisitions are within a per cent of 1.
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 0.1:
        raise _bad_affine("the header's orientation (affine) squeezes the volume flat")
    if np.abs(affine[:3, 3]).max() > 1e5:
        raise _bad_affine("the header puts the volume more than 100 m away from the scanner's centre")
    return affine


def check_voxels(shape: tuple[int, int, int], limits: Settings) -> None:
    """Raises `ScanError` for a volume that is too large or too small."""
    voxels = shape[0] * shape[1] * shape[2]
    text = " x ".join(map(str, shape))
    if voxels > limits.max_voxels:
        raise ScanError(
            "too-many-voxels",
            f"the volume is {text}, more than {limits.max_voxels} voxels",
            "Crop or resample it, or ask the operator to raise PASSION_MAX_VOXELS.",
        )
    if min(shape) < limits.min_axis:
        raise ScanError(
            "too-few-voxels",
            f"the volume is {text}; each axis must have {limits.min_axis} voxels or more",
            "Send the whole volume rather than a slice or a thin slab.",
        )


def check_spacing(affine: npt.NDArray[np.float64], limits: Settings) -> npt.NDArray[np.float64]:
    """The edges of a voxel in mm. Raises `ScanError` for implausible ones."""
    spacing: npt.NDArray[np.float64] = np.linalg.norm(affine[:3, :3], axis=0)
    if (spacing < limits.min_spacing).any() or (spacing > limits.max_spacing).any():
        text = " x ".join(f"{s:.4g}" for s in spacing)
        raise ScanError(
            "bad-spacing",
            f"voxels are {text} mm; each edge must be {limits.min_spacing:g} to {limits.max_spacing:g} mm",
            "Correct the spacing in the header (is its unit mm?), or resample the volume.",
        )
    return spacing


def _bad_affine(detail: str) -> ScanError:
    return ScanError("bad-affine", detail, "Set the sform or qform with a NIfTI tool, or export the file again.")


def _dtype(header: Nifti1Header) -> np.dtype[np.generic]:
    from nibabel.spatialimages import HeaderDataError

    code = int(header["datatype"])
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        raise _bad_dtype(f"unknown data type code {code}") from error
    if dtype.fields is not None or dtype.kind + str(dtype.itemsize) not in READABLE:
        name = "RGB" if dtype.fields is not None else dtype.name
        raise _bad_dtype(f"voxels of type {name}")
    if int(header["bitpix"]) != dtype.itemsize * 8:
        detail = f"the header gives a voxel of type {dtype.name} {int(header['bitpix'])} bits"
        raise ScanError("bad-header", detail, REWRITE)
    result: np.dtype[np.generic] = dtype
    return result


def _bad_dtype(what: str) -> ScanError:
    return ScanError(
        "bad-data-type", f"the file has {what}", "Convert it to one grey value per voxel: int16, uint16 or float32."
    )


def _scaling(header: Nifti1Header) -> tuple[float, float]:
    """Slope and intercept. A slope of 0 (the standard) or NaN (nibabel) means that values stand as they are."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or np.isnan(slope):
        return 1.0, 0.0
    if not (np.isfinite(slope) and np.isfinite(inter)):
        raise ScanError("bad-header", "the header's scl_slope or scl_inter is not finite", REWRITE)
    return slope, inter
