"""`Scan`: one uploaded volume, checked from its first byte to its last voxel before anybody works on it."""

from __future__ import annotations

import gzip
import io
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from app.jobs.settings import Settings

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Header

REWRITE = "Write the file again with a NIfTI tool."
GZIP = b"\x1f\x8b"
CHUNK = 1 << 20
NIFTI1, NIFTI2 = 348, 540
SINGLE_FILE = {b"n+1\0": NIFTI1, b"n+2\0": NIFTI2}
TWO_FILES = {b"ni1\0", b"ni2\0"}
READABLE = {"i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"}
MAX_HEADER = 16 << 20
"""Bytes before the first voxel, header extensions included. Real ones hold a few kilobytes."""

QUIET = logging.getLogger("app.jobs.scan.quiet")
QUIET.disabled = True  # nibabel's complaints quote the header

Bounds = npt.NDArray[np.float64]


class ScanError(Exception):
    """A volume that will not do: `kind` for programs, `detail` and `remedy` for people."""

    def __init__(self, kind: str, detail: str, remedy: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.remedy = remedy


@dataclass(frozen=True)
class Scan:
    """What was found: whether the bytes are gzip, (X, Y, Z) in voxels, and voxel to world (mm, RAS+) as 4 x 4."""

    compressed: bool
    shape: tuple[int, int, int]
    affine: npt.NDArray[np.float64]

    def bounds(self) -> Bounds:
        """World box (2, 3) in mm around all voxels, from their outer edges."""
        corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in self.shape], indexing="ij")).reshape(3, -1)
        world = self.affine[:3, :3] @ corners + self.affine[:3, 3:]
        return np.stack([world.min(axis=1), world.max(axis=1)])


def magic(head: bytes) -> bool:
    """Whether a file's first bytes (at least 4) are gzip's rather than NIfTI's own. Raises `ScanError` for neither.

    Names are not looked at: they lie, and they belong to the sender.
    """
    if head[:2] == GZIP:
        return True
    if len(head) >= 4 and int.from_bytes(head[:4], "little") in (NIFTI1, NIFTI2):
        return False
    if len(head) >= 4 and int.from_bytes(head[:4], "big") in (NIFTI1, NIFTI2):
        return False
    raise ScanError("not-nifti", "this is neither a NIfTI file nor a gzip file", "Send a .nii or .nii.gz file.")


def check(path: Path, limits: Settings) -> Scan:
    """Read a whole file once, in chunks of 1 MiB, holding no more than that. Raises `ScanError` with the reason.

    It is decompressed here and nowhere kept, so that a bomb stops at `max_uncompressed_bytes` with nothing written.
    """
    with path.open("rb") as raw:
        compressed = magic(raw.read(4))
        raw.seek(0)
        stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw, mode="rb") if compressed else raw)
        try:
            return _check(_Counted(stream, limits.max_uncompressed_bytes), compressed, limits)
        except EOFError as error:
            raise ScanError(
                "truncated", "the gzip data end in the middle", "The file was cut off: copy or export it again."
            ) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ScanError(
                "corrupt-gzip", "the gzip data are damaged", "Copy or export the file again; `gzip -t` checks it."
            ) from error


class _Counted:
    """Reads a stream and stops at a number of bytes."""

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        self._stream = stream
        self._left = limit
        self._limit = limit

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ScanError(
                "too-large-uncompressed",
                f"the file decompresses to more than {self._limit} bytes",
                "Crop or resample the volume, or ask the operator to raise PASSION_MAX_UNCOMPRESSED_BYTES.",
            )
        return data

    def exactly(self, size: int) -> bytes:
        """`size` bytes, or fewer at the end of the stream."""
        parts = bytearray()
        while len(parts) < size:
            part = self.read(min(CHUNK, size - len(parts)))
            if not part:
                break
            parts += part
        return bytes(parts)


def _check(stream: _Counted, compressed: bool, limits: Settings) -> Scan:
    header, consumed = _header(stream)
    shape = _shape(header, limits)
    affine = _affine(header, limits)
    dtype = _dtype(header)
    slope, inter = _scaling(header)
    offset = _offset(header, consumed)
    _tolerated(header)
    skipped = stream.exactly(offset - consumed)
    needed = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(skipped) < offset - consumed:
        raise _cut_off(needed, 0)
    low, high = _extremes(stream, dtype, needed)
    _values(low, high, slope, inter)
    while stream.read(CHUNK):  # to the end, for gzip's check sum and the limit
        pass
    return Scan(compressed, shape, affine)


def _header(stream: _Counted) -> tuple[Nifti1Header, int]:
    """The header and how many bytes it took."""
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    head = stream.exactly(NIFTI1)
    size = {int.from_bytes(head[:4], order) for order in ("little", "big")} & {NIFTI1, NIFTI2}
    if len(head) < NIFTI1:
        raise ScanError("truncated", "the file is shorter than a NIfTI header", "Copy or export the file again.")
    if not size:
        raise ScanError("not-nifti", "the gzip file holds no NIfTI volume", "Send a .nii or .nii.gz file.")
    if size == {NIFTI2}:
        head += stream.exactly(NIFTI2 - NIFTI1)
        if len(head) < NIFTI2:
            raise ScanError("truncated", "the file is shorter than a NIfTI-2 header", "Copy or export the file again.")
    word = head[344:348] if size == {NIFTI1} else head[4:8]
    if word in TWO_FILES:
        raise ScanError(
            "two-files", "this is the header of a .hdr/.img pair", "Convert the pair to one .nii or .nii.gz file."
        )
    if word not in SINGLE_FILE or {SINGLE_FILE[word]} != size:
        raise ScanError(
            "not-nifti", "the header lacks NIfTI's magic (an Analyze file?)", "Convert the file to .nii or .nii.gz."
        )
    kind = Nifti1Header if size == {NIFTI1} else Nifti2Header
    header: Nifti1Header = kind.from_fileobj(io.BytesIO(head), check=False)
    return header, len(head)


def _offset(header: Nifti1Header, consumed: int) -> int:
    """The byte at which voxels start."""
    offset = float(header["vox_offset"])
    if not consumed + 4 <= offset <= MAX_HEADER:  # nor is NaN; 4 bytes say whether extensions follow the header
        raise ScanError("bad-header", f"the header says that voxels start at byte {offset:g}", REWRITE)
    return int(offset)


def _tolerated(header: Nifti1Header) -> None:
    """Turn away what nibabel would refuse to load later, in the worker."""
    from nibabel.spatialimages import HeaderDataError

    try:
        header.copy().check_fix(logger=QUIET)
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
    return shape[0], shape[1], shape[2]


def _affine(header: Nifti1Header, limits: Settings) -> npt.NDArray[np.float64]:
    from nibabel.spatialimages import HeaderDataError

    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
        raise _bad_affine("the header's orientation cannot be read") from error
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise _bad_affine("the header's orientation (affine) has values that are not finite")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if (spacing < limits.min_spacing).any() or (spacing > limits.max_spacing).any():
        text = " x ".join(f"{s:.4g}" for s in spacing)
        raise ScanError(
            "bad-spacing",
            f"voxels are {text} mm; each edge must be {limits.min_spacing:g} to {limits.max_spacing:g} mm",
            "Correct the spacing in the header (is its unit mm?), or resample the volume.",
        )
    # 1 for right angles, 0 for axes that fall into one plane. Real acquisitions are within a per cent of 1.
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 0.1:
        raise _bad_affine("the header's orientation (affine) squeezes the volume flat")
    if np.abs(affine[:3, 3]).max() > 1e5:
        raise _bad_affine("the header puts the volume more than 100 m away from the scanner's centre")
    return affine


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
    result: np.dtype[np.generic] = dtype
    return result


def _bad_dtype(what: str) -> ScanError:
    return ScanError(
        "bad-data-type", f"the file has {what}", "Convert it to one grey value per voxel: int16, uint16 or float32."
    )


def _scaling(header: Nifti1Header) -> tuple[float, float]:
    """Slope and intercept; as the standard has it, a slope of 0 (or none) means that values stand as they are."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        return 1.0, 0.0
    if not np.isfinite(inter):
        raise ScanError("bad-header", "the header's scl_inter is not finite", REWRITE)
    return slope, inter


def _extremes(stream: _Counted, dtype: np.dtype[np.generic], needed: int) -> tuple[float, float]:
    """Least and largest raw value. Raises `ScanError` for data that end early or are not finite."""
    low, high, done = np.inf, -np.inf, 0
    step = CHUNK - CHUNK % dtype.itemsize
    while done < needed:
        data = stream.exactly(min(step, needed - done))
        done += len(data)
        if not data or (len(data) % dtype.itemsize):
            raise _cut_off(needed, done)
        values = np.frombuffer(data, dtype)
        least, largest = float(values.min()), float(values.max())  # NaN if any voxel is
        if not (np.isfinite(least) and np.isfinite(largest)):
            raise ScanError(
                "not-finite", "the volume has voxels that are NaN or infinite", "Replace them, with 0 outside the head."
            )
        low, high = min(low, least), max(high, largest)
    return low, high


def _cut_off(needed: int, done: int) -> ScanError:
    return ScanError(
        "truncated",
        f"the header announces {needed} bytes of voxels and the file ends after {done}",
        "The file was cut off: copy or export it again.",
    )


def _values(low: float, high: float, slope: float, inter: float) -> None:
    scaled = (low * slope + inter, high * slope + inter)
    if max(abs(s) for s in scaled) > float(np.finfo(np.float32).max):
        raise ScanError(
            "not-finite",
            "voxel values are beyond the range of float32",
            "Scale the image (scl_slope, scl_inter).",
        )
    if low == high:
        what = "only zeros" if scaled[0] == 0 else "one value in all voxels"
        raise ScanError("empty-image", f"the volume has {what}", "Send the image itself, or leave this modality out.")


def overlap(a: Scan, b: Scan) -> float:
    """Share of the smaller volume's world box that lies in the larger one's, 0..1."""
    one, two = a.bounds(), b.bounds()
    shared = np.clip(np.minimum(one[1], two[1]) - np.maximum(one[0], two[0]), 0, None)
    smaller = min(float(np.prod(one[1] - one[0])), float(np.prod(two[1] - two[0])))
    return float(np.prod(shared)) / smaller


def check_same_field_of_view(scans: Sequence[tuple[str, Scan]], least: float) -> str | None:
    """The first of the named scans whose field of view is not that of the very first; None if all agree.

    Boxes need not be equal: sequences differ in slab and slice thickness, and an oblique box is larger than its
    content. Half of the smaller box is the default: volumes of one head pass, a head and a knee do not.
    """
    if not scans:
        return None
    first = scans[0][1]
    return next((name for name, scan in scans[1:] if overlap(first, scan) < least), None)
