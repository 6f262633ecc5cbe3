"""`Progress`: how far a run is, for the record; and the way in which a cancelled run learns that it is."""

from __future__ import annotations

import time
from collections.abc import Callable

from app.jobs.record import Job
from app.jobs.store import JobStore

SHARES = {"loading": (0.0, 10.0), "normalising": (10.0, 15.0), "segmenting": (15.0, 95.0), "restoring": (95.0, 99.0)}
"""Where each stage begins and ends in per cent. Segmenting is nearly all of the time."""

INTERVAL = 0.5


class Progress:
    """Called by the predictor, once per window and more. Writes when the stage changes and else every half second."""

    def __init__(self, store: JobStore, job: Job, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._job = job
        self._clock = clock
        self._stage = ""
        self._due = 0.0

    def __call__(self, stage: str, fraction: float) -> None:
        """`fraction` of `stage` is done. Raises `app.jobs.store.JobOverError` when the run should stop, and
        `redis.RedisError`."""
        if stage == self._stage and self._clock() < self._due:
            return
        self._stage, self._due = stage, self._clock() + INTERVAL
        begin, end = SHARES.get(stage, (0.0, 0.0))
        self._store.progress(self._job, stage, begin + (end - begin) * min(max(fraction, 0.0), 1.0))
