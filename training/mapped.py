"""What is read of memory-mapped arrays: the pages that hold what is asked for, and no others."""

from __future__ import annotations

import mmap
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from models.intake import Box

Value = TypeVar("Value", bound=np.generic)


def read_box(volume: npt.NDArray[Value], box: Box) -> npt.NDArray[Value]:
    """A copy of the box's voxels of a memory map (X, Y, Z) in C order, 0 outside the volume."""
    held = _without_read_ahead(volume)
    if held is not None:
        _announce(volume, held, box)
    cut = box.cut(volume)
    return cut if cut.flags.writeable else cut.copy()  # whole planes need no gathering, and come as the map itself


def read_one(array: npt.NDArray[Value], place: int) -> Value:
    """The value at a place in C order of a memory map."""
    _without_read_ahead(array)
    value: Value = array.reshape(-1)[place]
    return value


def _without_read_ahead(array: npt.NDArray[Value]) -> mmap.mmap | None:
    """Left to itself the system reads megabytes around every page that is missing: most of a volume for one crop."""
    held = array.base
    if isinstance(array, np.memmap) and isinstance(held, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):
        held.madvise(mmap.MADV_RANDOM)
        return held
    return None  # some systems take no advice: the same values, only slower


def _announce(volume: npt.NDArray[Value], held: mmap.mmap, box: Box) -> None:
    """Have all pages of the box fetched at once, rather than one after the other as the copy comes upon them."""
    assert isinstance(volume, np.memmap)
    first = np.maximum(box.start, 0)
    last = np.minimum(box.stop, volume.shape) - 1
    # The map begins at the page where the array does, so its header, or a part of it, goes before.
    begin = volume.offset % mmap.ALLOCATIONGRANULARITY
    # In a plane the box lies from its first voxel to its last: a page holds some rows, so it is nearly all of that.
    low = begin + int(first[1:] @ volume.strides[1:])
    high = begin + int(last[1:] @ volume.strides[1:]) + volume.itemsize
    for x in range(first[0], last[0] + 1):
        plane = x * volume.strides[0]
        start = (low + plane) // mmap.PAGESIZE * mmap.PAGESIZE
        held.madvise(mmap.MADV_WILLNEED, start, high + plane - start)
