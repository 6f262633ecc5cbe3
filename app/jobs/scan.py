"""`Scan`: one uploaded volume, checked from its first byte to its last voxel before anybody works on it."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
import numpy.typing as npt
from isal import igzip, isal_zlib

from app.jobs.scan_header import NIFTI1, NIFTI2, REWRITE, ScanError, ScanHeader, size_of
from app.jobs.scrub import clean_copy, clean_header
from app.jobs.settings import Settings

GZIP = b"\x1f\x8b"
CHUNK = 1 << 20
MIN_EXTENSION = 16
DAMAGED = (
    gzip.BadGzipFile,
    OverflowError,  # a name or comment in gzip's header that is longer than isal's buffer
    cast(type[Exception], isal_zlib.error),  # isal's type stub takes the class for an instance
)

Bounds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scan:
    """What was found: (X, Y, Z) in voxels, and voxel to world (mm, RAS+) as 4 x 4."""

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
    if size_of(head) is not None:
        return False
    raise ScanError(
        "not-nifti",
        "this is neither a NIfTI file nor a gzip file",
        "Send a .nii or .nii.gz file, or a .zip of one DICOM series.",
    )


def check(sent: Path, clean: Path, limits: Settings) -> Scan:
    """Read the file `sent` once, in chunks of 1 MiB, and write what may be kept of it to `clean` (.nii.gz).

    Of a gzip bomb no more than `max_uncompressed_bytes` is decompressed. Raises `ScanError` with the reason, and
    `OSError` as the file system does; `clean` is then not there.
    """
    with sent.open("rb") as raw, clean_copy(clean) as write:
        compressed = magic(raw.read(4))
        raw.seek(0)
        stream = cast(IO[bytes], igzip.IGzipFile(fileobj=raw, mode="rb") if compressed else raw)
        try:
            return _check(_Counted(stream, limits.max_uncompressed_bytes), write, limits)
        except EOFError as error:
            raise ScanError(
                "truncated", "the gzip data end in the middle", "The file was cut off: copy or export it again."
            ) from error
        except DAMAGED as error:
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

    def skip(self, size: int) -> int:
        """Pass over `size` bytes; returns how many there were."""
        done = 0
        while done < size and (part := self.read(min(CHUNK, size - done))):
            done += len(part)
        return done


def _check(stream: _Counted, write: Callable[[bytes], object], limits: Settings) -> Scan:
    header = ScanHeader.parse(_head(stream), limits)
    _skip_extensions(stream, header)
    write(clean_header(header.nifti))
    low, high = _extremes(stream, write, header)
    _values(low, high, header)
    while stream.read(CHUNK):  # to the end, for gzip's check sum and the limit; nothing of it is kept
        pass
    return Scan(header.shape, header.affine)


def _head(stream: _Counted) -> bytes:
    """The header's bytes."""
    head = stream.exactly(NIFTI1)
    if len(head) < NIFTI1:
        raise ScanError("truncated", "the file is shorter than a NIfTI header", "Copy or export the file again.")
    size = size_of(head)
    if size is None:
        raise ScanError("not-nifti", "the gzip file holds no NIfTI volume", "Send a .nii or .nii.gz file.")
    if size == NIFTI2:
        head += stream.exactly(NIFTI2 - NIFTI1)
        if len(head) < NIFTI2:
            raise ScanError("truncated", "the file is shorter than a NIfTI-2 header", "Copy or export the file again.")
    return head


def _skip_extensions(stream: _Counted, header: ScanHeader) -> None:
    """Pass over what stands between header and voxels, if it is made as it says."""
    left = header.offset - header.nifti.sizeof_hdr
    flags = stream.exactly(4)
    left -= 4
    if flags[:1] > b"\0":
        while left >= MIN_EXTENSION and len(start := stream.exactly(8)) == 8:
            size = int.from_bytes(start[:4], header.byte_order, signed=True)
            if size < MIN_EXTENSION or size % 16 or size > left:
                raise ScanError("bad-header", f"a header extension says that it has {size} bytes", REWRITE)
            left -= size
            if stream.skip(size - 8) < size - 8:
                raise _cut_off(header.voxel_bytes, 0)
    if stream.skip(left) < left:
        raise _cut_off(header.voxel_bytes, 0)


def _extremes(stream: _Counted, write: Callable[[bytes], object], header: ScanHeader) -> tuple[float, float]:
    """Write the voxels; least and largest raw value. Raises `ScanError` for data that end early or are not finite."""
    low, high, done = np.inf, -np.inf, 0
    dtype, needed = header.dtype, header.voxel_bytes
    while done < needed:
        size = min(CHUNK, needed - done)  # whole voxels: both are multiples of 8, or of a voxel
        data = stream.exactly(size)
        done += len(data)
        if len(data) < size:
            raise _cut_off(needed, done)
        values = np.frombuffer(data, dtype)
        least, largest = float(values.min()), float(values.max())  # NaN if any voxel is
        if not (np.isfinite(least) and np.isfinite(largest)):
            raise ScanError(
                "not-finite", "the volume has voxels that are NaN or infinite", "Replace them, with 0 outside the head."
            )
        low, high = min(low, least), max(high, largest)
        write(data)
    return low, high


def _cut_off(needed: int, done: int) -> ScanError:
    return ScanError(
        "truncated",
        f"the header announces {needed} bytes of voxels and the file ends after {done}",
        "The file was cut off: copy or export it again.",
    )


def _values(low: float, high: float, header: ScanHeader) -> None:
    scaled = (low * header.slope + header.inter, high * header.slope + header.inter)
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
