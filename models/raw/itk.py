"""`alone`: SimpleITK on one thread, so that sums have one order on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def alone() -> Iterator[None]:
    """One thread for what is made in here: the threads of a filter's own parts are set nowhere else."""
    import SimpleITK as sitk  # noqa: N813 - its documentation calls it so

    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
