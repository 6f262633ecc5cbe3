"""`Reaper`: gives jobs that nobody works on to somebody else."""

from __future__ import annotations

import secrets
import time
from typing import cast

import redis
import structlog

from app.jobs.connection import clock
from app.jobs.lines import Line
from app.jobs.names import MISSING, UNSERVED
from app.jobs.presence import Presence
from app.jobs.queue import JobQueue, QueueError
from app.jobs.record import Failure, Job, JobState, now
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
    and message, or a worker between taking a message and beginning; Redis came back without its last second). And two
    must not wait for ever: a job of priority batch behind interactive ones, and, where there is a limit, one that no
    worker serves."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self._redis = client
        self._jobs = JobStore(client, settings)
        self._queue = JobQueue(settings)
        self._tally = Tally(client)
        self._presence = Presence(client)
        self._batch_wait = settings.batch_wait
        self._unserved_limit = settings.unserved_limit
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
        waiting = self._jobs.waiting()
        self._send_what_is_missing(waiting)
        self._hasten(waiting)
        if self._unserved_limit:
            self._give_up_unserved(waiting)

    def _take_from_the_lost(self) -> None:
        for lapsed in self._jobs.lapsed():
            job = self._jobs.give_up(lapsed)
            if job is None:
                continue
            if job.state is JobState.QUEUED:
                log.warning("a worker was lost: its job waits again", job_id=job.id, attempts=job.attempts)
                self._send(job)
            else:
                log.error("a worker was lost: its job is given up", job_id=job.id, attempts=job.attempts)

    def _send_what_is_missing(self, waiting: list[Job]) -> None:
        sent = self._queue.message_ids(self._redis, waiting) if waiting else set()
        missing = {job.id: job for job in waiting if job.id not in sent}
        for job_id, seconds in self._so_for(MISSING, list(missing)).items():
            if seconds > MISSING_FOR and self._send(missing[job_id]):
                log.warning("no message spoke of a waiting job: sent again", job_id=job_id)
                self._tally.count_resent()

    def _hasten(self, waiting: list[Job]) -> None:
        for job in waiting:
            if job.priority == "batch" and (now() - job.queued).total_seconds() > self._batch_wait:
                hastened = self._jobs.hasten(job.id)
                # Its first message stays, and finds nothing to do.
                if hastened is not None and self._send(hastened):
                    log.info("a job of priority batch has waited long enough", job_id=job.id)

    def _give_up_unserved(self, waiting: list[Job]) -> None:
        served = self._presence.served()
        unserved = {job.id: job for job in waiting if Line.of(job).queue not in served}
        for job_id, seconds in self._so_for(UNSERVED, list(unserved)).items():
            if seconds > self._unserved_limit and self._jobs.fail_waiting(job_id, _nobody(unserved[job_id], seconds)):
                log.error("no worker served a waiting job: it is given up", job_id=job_id)

    def _so_for(self, name: str, job_ids: list[str]) -> dict[str, float]:
        """Of the waiting jobs that something is wrong with, as seen now: for how many seconds that has been so. Kept in
        Redis, by the name of what is wrong, for the next round may be another process's."""
        at = clock(self._redis)
        known = cast("list[str]", self._redis.zrange(name, 0, -1))
        right_again = [job_id for job_id in known if job_id not in job_ids]
        with self._redis.pipeline(transaction=False) as pipe:
            if right_again:
                pipe.zrem(name, *right_again)
            if job_ids:
                pipe.zadd(name, dict.fromkeys(job_ids, at), nx=True)
            pipe.zrange(name, 0, -1, withscores=True)
            since = dict(cast("list[tuple[str, float]]", pipe.execute()[-1]))
        return {job_id: at - since[job_id] for job_id in job_ids if job_id in since}

    def _send(self, job: Job) -> bool:
        try:
            self._queue.submit(job)
        except QueueError:  # found missing in a later round
            return False
        self._redis.zrem(MISSING, job.id)
        return True

    def close(self) -> None:
        """Close the connections to the broker."""
        self._queue.close()


def _nobody(job: Job, seconds: float) -> Failure:
    return Failure(
        title="No worker serves this model",
        detail=f"The job has waited for {Line.of(job).server} for {seconds:.0f} s. The operator starts one, or changes "
        "PASSION_NEEDS or PASSION_SERVE_MODELS; then send the images again.",
        kind="no-worker",
    )
