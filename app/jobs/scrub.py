"""The clean copy of an uploaded volume: the voxels, where they are, and nothing that could tell whose they are."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from isal import isal_zlib

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Header

KEPT = (
    *("dim", "datatype", "bitpix", "pixdim", "scl_slope", "scl_inter", "xyzt_units"),
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z"),
)
"""What voxels and geometry need. Any other field is left at 0, the ones that future tools may know too."""
NO_EXTENSIONS = bytes(4)
END_OF_LINES = (13, 10, 26, 10)
"""NIfTI-2's magic goes on with these."""
LEVEL = 1
GZIP_FORMAT = zlib.MAX_WBITS | 16


def clean_header(header: Nifti1Header) -> bytes:
    """The bytes before the first voxel: of `header` no more than `KEPT`, no extensions. Kind and byte order stay."""
    clean = np.zeros((), header.structarr.dtype)
    for name in KEPT:
        clean[name] = header[name]
    used = int(header["dim"][0]) + 1
    for name in ("dim", "pixdim"):
        clean[name][used:] = 1
    clean["sizeof_hdr"] = header.sizeof_hdr
    clean["magic"] = header.single_magic
    if "eol_check" in (clean.dtype.names or ()):
        clean["eol_check"] = END_OF_LINES
    clean["vox_offset"] = header.single_vox_offset
    return clean.tobytes() + NO_EXTENSIONS


@contextmanager
def clean_copy(path: Path) -> Iterator[Callable[[bytes], object]]:
    """A function that writes to what will be `path`, gzip without a name or a time: whole in the end, or not at all.

    Raises `OSError` as the file system does.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            compressor = isal_zlib.compressobj(LEVEL, zlib.DEFLATED, GZIP_FORMAT)
            yield lambda data: file.write(compressor.compress(data))
            file.write(compressor.flush())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
