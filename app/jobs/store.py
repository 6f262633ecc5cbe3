"""`JobStore`: the job records in Redis. They are the truth; the queue only carries ids."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, cast

import redis
from redis.client import Pipeline

from app.jobs.record import Failure, Job, JobState, now
from app.jobs.settings import Settings

SEQUENCE = "passion:sequence"
WAITING = "passion:waiting"
"""Sorted set of the queued jobs by order of arrival, for positions: Celery's own list holds messages, not ids."""


def _key(job_id: str) -> str:
    return f"passion:job:{job_id}"


class UnknownJobError(LookupError):
    """No record under this id: never made, or removed."""


class JobOverError(RuntimeError):
    """The job is no longer this worker's to write: cancelled, finished, removed, or started again elsewhere."""


class JobStore:
    """Reads and changes job records. Every change is one optimistic transaction (WATCH, MULTI, EXEC) that looks at the
    state it starts from, so a cancelled job can never become running and two workers can never both finish one.

    All methods raise `redis.RedisError` when Redis does not answer.
    """

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self._redis = client
        self._max_attempts = settings.max_attempts
        self._cancelled_kept = int(settings.cancelled_kept)

    def ping(self) -> None:
        """Return if Redis answers."""
        self._redis.ping()

    def create(self, job: Job) -> None:
        """Write the record of a new job and put it at the end of the line."""
        sequence = self._redis.incr(SEQUENCE)
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(_key(job.id), job.model_dump_json(), nx=True)
            pipe.zadd(WAITING, {job.id: sequence})
            pipe.execute()

    def get(self, job_id: str) -> Job:
        """The record. Raises `UnknownJobError`."""
        raw = cast("str | None", self._redis.get(_key(job_id)))
        if raw is None:
            raise UnknownJobError(job_id)
        return Job.model_validate_json(raw)

    def position(self, job_id: str) -> int | None:
        """1 for the job that is next, 2 for the one after it; None for one that does not wait."""
        rank = cast("int | None", self._redis.zrank(WAITING, job_id))
        return None if rank is None else rank + 1

    def begin(self, job_id: str) -> Job | None:
        """Take a job for this worker: state running, one more attempt, a new `run`. A job found running was a lost
        worker's, for the broker hands a message out again only when its worker is gone. None: there is nothing to
        do, because the job is unknown or over, or has now failed for having been started too often."""

        def take(job: Job) -> Job:
            if job.attempts >= self._max_attempts:
                return job.model_copy(
                    update={
                        "state": JobState.FAILED,
                        "finished": now(),
                        "error": Failure(
                            title="The worker was lost",
                            detail=f"The process that worked on this job ended {job.attempts} times before it was "
                            "done, probably for want of memory. A smaller volume or a larger worker may help.",
                        ),
                    }
                )
            return job.model_copy(
                update={
                    "state": JobState.RUNNING,
                    "attempts": job.attempts + 1,
                    "run": secrets.token_hex(8),
                    "started": job.started or now(),
                    "stage": "starting",
                    "percent": 0.0,
                }
            )

        try:
            job = self._change(job_id, _unless_over, take)
        except (UnknownJobError, JobOverError):
            return None
        return job if job.state is JobState.RUNNING else None

    def owns(self, job: Job) -> bool:
        """Whether `job`, as `begin` gave it, is still its worker's to work on."""
        try:
            current = self.get(job.id)
        except UnknownJobError:
            return False
        return current.state is JobState.RUNNING and current.run == job.run

    def progress(self, job: Job, stage: str, percent: float) -> None:
        """Write how far a run is. Raises `JobOverError` when it should stop: this is how a running job is cancelled."""
        self._change_run(job, lambda j: j.model_copy(update={"stage": stage, "percent": percent}))

    def succeed(self, job: Job, volumes_ml: dict[str, float], weights_sha256: str) -> Job:
        """End a run with its result; the mask must be on the store already. Raises `JobOverError`."""
        result = {
            "state": JobState.SUCCEEDED,
            "finished": now(),
            "stage": None,
            "percent": 100.0,
            "volumes_ml": volumes_ml,
            "weights_sha256": weights_sha256,
        }
        return self._change_run(job, lambda j: j.model_copy(update=result))

    def fail(self, job: Job, failure: Failure) -> Job:
        """End a run without one. Raises `JobOverError`."""
        return self._change_run(job, lambda j: j.model_copy(update=_failed(failure)))

    def fail_whatever_runs(self, job_id: str, failure: Failure) -> None:
        """End a job whose run died with the process that knew its name. Does nothing to a job that is over."""
        try:
            self._change(job_id, _unless_over, lambda j: j.model_copy(update=_failed(failure)))
        except (UnknownJobError, JobOverError):
            return

    def release(self, job: Job) -> None:
        """Put a run back in the line because its worker is told to stop; this attempt does not count."""

        def back(current: Job) -> Job:
            changes = {"state": JobState.QUEUED, "attempts": current.attempts - 1, "run": "", "stage": None}
            return current.model_copy(update={**changes, "percent": 0.0, "started": None})

        self._change_run(job, back)

    def cancel(self, job_id: str) -> Job:
        """Cancel a job that is not over. Its record stays readable for a while, so that a worker and a reader both see
        what became of it. Raises `JobOverError` for one that is over, `UnknownJobError`."""
        over = {"state": JobState.CANCELLED, "finished": now(), "stage": None}
        return self._change(job_id, _unless_over, lambda j: j.model_copy(update=over))

    def remove(self, job_id: str) -> None:
        """Forget a job."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(_key(job_id))
            pipe.zrem(WAITING, job_id)
            pipe.execute()

    def _change_run(self, job: Job, change: Callable[[Job], Job]) -> Job:
        def ours(current: Job) -> None:
            if current.state is not JobState.RUNNING or current.run != job.run:
                raise JobOverError(job.id)

        try:
            return self._change(job.id, ours, change)
        except UnknownJobError as error:
            raise JobOverError(job.id) from error

    def _change(self, job_id: str, check: Callable[[Job], None], change: Callable[[Job], Job]) -> Job:
        """Replace a record by `change(record)` if `check(record)` does not raise, with nobody else in between."""
        key = _key(job_id)

        def transaction(pipe: Pipeline) -> Job:
            raw = cast("str | None", pipe.get(key))
            if raw is None:
                raise UnknownJobError(job_id)
            before = Job.model_validate_json(raw)
            check(before)
            after = change(before)
            pipe.multi()
            kept = self._cancelled_kept if after.state is JobState.CANCELLED else None
            pipe.set(key, after.model_dump_json(), ex=kept)
            if after.state is not JobState.QUEUED:
                pipe.zrem(WAITING, job_id)
            elif before.state is not JobState.QUEUED:
                # Back to the head of the line: it has waited already, and its message is redelivered first.
                pipe.zadd(WAITING, {job_id: 0})
            return after

        # redis-py's types know of callables that return nothing only.
        result = self._redis.transaction(cast(Any, transaction), key, value_from_callable=True)
        return cast(Job, result)


def _unless_over(job: Job) -> None:
    if job.state.final:
        raise JobOverError(job.id)


def _failed(failure: Failure) -> dict[str, object]:
    return {"state": JobState.FAILED, "finished": now(), "stage": None, "error": failure}
