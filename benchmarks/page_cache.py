"""What of a file the system holds in memory: to begin cold, and to see afterwards what was read. Linux only."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)


def drop(path: Path) -> None:
    """Have the system forget a file's content; pages that a process has mapped stay."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)  # what is not written yet cannot be forgotten
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def resident_pages(path: Path) -> list[bool]:
    """For each page of a file whether it is in memory."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as held:
        found = (ctypes.c_ubyte * -(-len(held) // mmap.PAGESIZE))()
        start = ctypes.c_ubyte.from_buffer(held)
        failed = _LIBC.mincore(ctypes.byref(start), ctypes.c_size_t(len(held)), found)
        del start  # or the map could not be closed
    if failed:
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return [bool(page & 1) for page in found]
