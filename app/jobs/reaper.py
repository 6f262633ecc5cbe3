"""`Reaper`: gives jobs that nobody works on to somebody else."""

from __future__ import annotations

import secrets
import time
from typing import cast

import redis
import structlog

from app.jobs.connection import clock
from app.jobs.names import MISSING
from app.jobs.queue import JobQueue, QueueError
from app.jobs.record import JobState
from app.jobs.settings import Settings
from app.jobs.store import JobStore
from app.jobs.tally import Tally

log = structlog.get_logger("app.jobs")

TURN = "passion:reaper"
MISSING_FOR = 10.0
"""Seconds after which a waiting job that no message speaks of is sent again. A message on its way into a worker's child
is nowhere to be seen for a moment; if it is still there after all, the job's lease tells the second one to go away."""


class Reaper:
    """Runs in every API process and in every worker's parent, and does its round in one of them at a time: jobs are
    looked after as long as any process of ours lives.

    Two things can be lost: a worker with its run (the lease lapses), and a message (the API was killed between record
    and message, or a worker between taking a message and beginning; Redis came back without its last second)."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self._redis = client
        self._jobs = JobStore(client, settings)
        self._queue = JobQueue(settings)
        self._tally = Tally(client)
        self._lease = settings.lease
        self._answers_since: float | None = None
        self.interval = settings.lease / 3
        """Seconds between two rounds."""

    def round(self) -> None:
        """One round, unless somebody else has just done it. Raises `redis.RedisError`."""
        try:
            turn = self._redis.set(TURN, secrets.token_hex(4), nx=True, px=max(1, int(900 * self.interval)))
        except redis.RedisError:
            self._answers_since = None
            raise
        if self._answers_since is None:
            self._answers_since = time.monotonic()
        if not turn:
            return
        # While Redis was away nobody could give a sign of life, and it is no sign of death that nobody did.
        if time.monotonic() - self._answers_since >= self._lease:
            self._take_from_the_lost()
        self._send_what_is_missing()

    def _take_from_the_lost(self) -> None:
        for lapsed in self._jobs.lapsed():
            job = self._jobs.give_up(lapsed)
            if job is None:
                continue
            if job.state is JobState.QUEUED:
                log.warning("a worker was lost: its job waits again", job_id=job.id, attempts=job.attempts)
                self._send(job.id)
            else:
                log.error("a worker was lost: its job is given up", job_id=job.id, attempts=job.attempts)

    def _send_what_is_missing(self) -> None:
        waiting = self._jobs.waiting()
        sent = self._queue.message_ids(self._redis) if waiting else set()
        missing = [job_id for job_id in waiting if job_id not in sent]
        for job_id, seconds in self._missing_for(missing).items():
            if seconds > MISSING_FOR and self._send(job_id):
                log.warning("no message spoke of a waiting job: sent again", job_id=job_id)
                self._tally.count_resent()

    def _missing_for(self, job_ids: list[str]) -> dict[str, float]:
        """Of the waiting jobs that no message speaks of, as seen now: for how many seconds that has been so. Kept in
        Redis, for the next round may be another process's."""
        at = clock(self._redis)
        known = cast("list[str]", self._redis.zrange(MISSING, 0, -1))
        found_again = [name for name in known if name not in job_ids]
        with self._redis.pipeline(transaction=False) as pipe:
            if found_again:
                pipe.zrem(MISSING, *found_again)
            if job_ids:
                pipe.zadd(MISSING, dict.fromkeys(job_ids, at), nx=True)
            pipe.zrange(MISSING, 0, -1, withscores=True)
            since = dict(cast("list[tuple[str, float]]", pipe.execute()[-1]))
        return {name: at - since[name] for name in job_ids if name in since}

    def _send(self, job_id: str) -> bool:
        try:
            self._queue.submit(job_id)
        except QueueError:  # found missing in a later round
            return False
        self._redis.zrem(MISSING, job_id)
        return True

    def close(self) -> None:
        """Close the connections to the broker."""
        self._queue.close()
