"""How a process of the loader starts and ends: it answers to its parent alone, and computes in one thread."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

_OF_THE_PARENT = {signal.SIGINT, signal.SIGTERM} if hasattr(signal, "sigtimedwait") else {signal.SIGINT}
"""Ctrl-C goes to every process of a terminal, a scheduler's SIGTERM to every process of a job: both are the trainer's
to answer, for which it still needs batches. macOS does not tell who sent a signal; there SIGTERM ends a process."""


@contextmanager
def starting() -> Iterator[None]:
    """Processes started in here leave signals to their parent, and start no threads to compute with."""
    # The libraries under numpy start a thread per core when they are imported.
    settings = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    before = {name: os.environ.get(name) for name in settings}
    resource_tracker.ensure_running()  # its own start, the first time, would unblock them again
    # A child starts with blocked what is blocked here; for us they come a moment later.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_PARENT)
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def obey_parent(_number: int) -> None:
    """First thing in a process of the loader, whose number torch passes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_PARENT)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Waits until the parent says SIGTERM, which others may say in vain, or is gone, and ends this process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    if signal.SIGTERM not in _OF_THE_PARENT:
        parent.join()
        os._exit(0)
    while parent.is_alive():
        received = signal.sigtimedwait((signal.SIGTERM,), 1.0)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)
