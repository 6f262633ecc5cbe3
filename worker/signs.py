"""`SignsOfLife`: says that a run is alive for as long as its process is, whatever the run is busy with."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import structlog
from redis import RedisError

from app.jobs.record import Job
from app.jobs.store import JobStore

log = structlog.get_logger("worker")


class SignsOfLife:
    """Renews the lease of a run from a thread of its own: a window may take longer than a lease. A run that hangs stays
    alive by this and meets its time limit; one whose process is killed, stopped or cut off from Redis does not."""

    def __init__(self, jobs: JobStore, job: Job, lease: float) -> None:
        self._jobs = jobs
        self._job = job
        self._pause = lease / 5
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="signs of life", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _renew(self) -> None:
        while not self._over.wait(self._pause):
            try:
                self._jobs.renew(self._job)
            except RedisError:
                log.warning("redis does not answer: this run cannot be seen", job_id=self._job.id)
