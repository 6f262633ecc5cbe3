"""One function over many items, in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from training.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Results as they come, in no order. One worker (or item) stays in this process.

    `function`, items and results must be picklable. Raises `UserError` if a process is killed, as by a machine that
    runs out of memory, or the disk refuses to write; what `function` raises otherwise comes through.
    """
    processes = min(workers, len(items))
    try:
        if processes <= 1:
            for item in items:
                yield function(item)
            return
        # Spawned, not forked: a child must not inherit the threads of whoever calls this.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_child)
        try:
            for done in as_completed([pool.submit(function, item) for item in items]):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)
    except BrokenProcessPool:
        raise UserError("a worker process was killed, perhaps for want of memory: try --workers 1") from None
    except OSError as error:
        raise UserError(f"{error.filename or 'writing'}: {error.strerror or error}") from None


def cores() -> int:
    """CPU cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not every system tells which cores are ours
        return os.cpu_count() or 1


def _start_child() -> None:
    # Ctrl-C is the parent's to answer; and a child does not outlive a parent that was killed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
