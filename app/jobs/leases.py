"""`Leases`: signs of life of the runs, by the clock of Redis, so that those of the workers need not agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import redis
from redis.client import Pipeline

from app.jobs.connection import clock

LEASES = "passion:leases"
"""Sorted set of `<job id> <run>` by the time (seconds, Redis's clock) until which the run is taken to live."""


@dataclass(frozen=True)
class Lapsed:
    """A run whose worker has not been heard of."""

    job_id: str
    run: str


class Leases:
    """A run is granted a lease in the transaction that begins it (`grant`), its worker renews it, and in the
    transaction that ends it the lease goes (`drop`). A run is one attempt at a job, so a worker that was thought dead
    can neither renew nor drop what its successor holds."""

    def __init__(self, client: redis.Redis, seconds: float) -> None:
        self._redis = client
        self._seconds = seconds

    def grant(self, pipe: Pipeline, job_id: str, run: str, at: float) -> None:
        """Within a transaction: the run lives from `at`, by `clock`."""
        pipe.zadd(LEASES, {_member(job_id, run): at + self._seconds})

    def drop(self, pipe: Pipeline, job_id: str, run: str) -> None:
        """Within a transaction: the run is over."""
        pipe.zrem(LEASES, _member(job_id, run))

    def renew(self, job_id: str, run: str) -> None:
        """A sign of life. Does nothing for a run that was taken for lost already."""
        self._redis.zadd(LEASES, {_member(job_id, run): clock(self._redis) + self._seconds}, xx=True)

    def end(self, job_id: str, run: str) -> None:
        """Say that the run's process is known to be gone, so that nobody waits for the lease to lapse."""
        self._redis.zadd(LEASES, {_member(job_id, run): 0.0}, xx=True)

    def live(self, client: redis.Redis, job_id: str, run: str, at: float) -> bool:
        """Whether a run's lease holds at the time `at`; `client` may be a pipeline that watches."""
        until = client.zscore(LEASES, _member(job_id, run))
        return until is not None and until > at

    def count(self) -> int:
        """Runs that live."""
        return self._redis.zcount(LEASES, clock(self._redis), "+inf")

    def lapsed(self) -> list[Lapsed]:
        """Runs that do not."""
        members = cast("list[str]", self._redis.zrangebyscore(LEASES, "-inf", clock(self._redis)))
        return [Lapsed(*member.split(" ", 1)) for member in members]

    def forget(self, lapsed: Lapsed) -> None:
        """Remove a lease that belongs to no running job."""
        self._redis.zrem(LEASES, _member(lapsed.job_id, lapsed.run))


def _member(job_id: str, run: str) -> str:
    return f"{job_id} {run}"
