"""The C library's heap while a network runs on the CPU: what one map gave back is there for the next.

A window or a training step makes and drops hundreds of maps of some ten megabytes. By default glibc asks the system for
each of them and gives it back, and the system clears every page at its first touch: a tenth of the time and more, and
no map ever lies where the processor's cache has it already.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Names of `mallopt`, as <malloc.h> numbers them."""
MADV_HUGEPAGE = 14
HUGE_PAGE = 2**21
RESERVED = 2**29
"""Bytes, of addresses alone: what a window takes at its worst moment, or more."""
MOST = 2**31 - 1
MMAP_MAX = 2**16
"""glibc's own default."""
TRIM_THRESHOLD = 2**26
"""Bytes; what glibc's own threshold grows to."""


@contextmanager
def kept_heap() -> Iterator[None]:
    """Within it, freed memory stays with this process; at its end what is free goes back to the system.

    Holds for the whole process, whatever thread it is. Does nothing where the C library is not glibc.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(M_ARENA_MAX, 1)  # for good: the heaps of other threads are too small for a map
    library.mallopt(M_MMAP_MAX, 0)
    library.mallopt(M_TRIM_THRESHOLD, MOST)
    _huge_pages(library)
    try:
        yield
    finally:
        library.mallopt(M_MMAP_MAX, MMAP_MAX)
        library.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
        library.malloc_trim(0)


def _huge_pages(library: ctypes.CDLL) -> None:
    """Have the heap's next pages be of 2 MiB: a five-hundredth of the faults. Takes addresses, not memory."""
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = library.malloc(RESERVED)
    if block:
        start = -(-block // HUGE_PAGE) * HUGE_PAGE
        library.madvise(start, (block + RESERVED - start) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
        library.free(block)


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    needed = ("gnu_get_libc_version", "mallopt", "malloc_trim", "madvise")
    return library if all(hasattr(library, name) for name in needed) else None
