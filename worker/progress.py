"""`Progress`: how far a run is, for the record; and the way in which a cancelled run learns that it is."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from app.jobs.record import Job
from app.jobs.store import JobStore
from app.jobs.traces import stage_ended

SHARES = {
    "loading": (0.0, 10.0),
    "preparing": (10.0, 15.0),
    "normalising": (15.0, 15.0),
    "segmenting": (15.0, 95.0),
    "restoring": (95.0, 99.0),
}
"""Where each stage begins and ends in per cent. Segmenting is nearly all of the time."""

INTERVAL = 0.5

log = structlog.get_logger("worker")


class Progress:
    """Called by the predictor, once per window and more. Writes when the stage changes and else every half second."""

    def __init__(self, store: JobStore, job: Job, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._job = job
        self._clock = clock
        self._stage = ""
        self._due = 0.0
        self._since = clock()
        self.seconds: dict[str, float] = {}
        """How long each stage that has ended took."""

    def __call__(self, stage: str, fraction: float) -> None:
        """`fraction` of `stage` is done. Raises `app.jobs.store.JobOverError` when the run should stop, and
        `redis.RedisError`."""
        if stage == self._stage and self._clock() < self._due:
            return
        if stage != self._stage:
            self.stage(stage)
        self._due = self._clock() + INTERVAL
        begin, end = SHARES.get(stage, (0.0, 0.0))
        self._store.progress(self._job, stage, begin + (end - begin) * min(max(fraction, 0.0), 1.0))

    def stage(self, stage: str) -> None:
        """A stage begins, and the one before it has ended."""
        at = self._clock()
        if self._stage:
            self.seconds[self._stage] = round(self.seconds.get(self._stage, 0.0) + at - self._since, 4)
            log.info("stage ended", stage=self._stage, seconds=round(at - self._since, 4))
            stage_ended(self._stage, at - self._since)
        self._stage, self._since = stage, at
