"""`JobStore`: the job records in Redis. They are the truth; the queue only carries ids."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import redis
from redis.client import Pipeline

from app.jobs.admission import Admission
from app.jobs.connection import clock
from app.jobs.leases import Lapsed, Leases
from app.jobs.lines import Line
from app.jobs.names import (
    ENDED,
    LATER,
    MISSING,
    SEQUENCE,
    TAKEN,
    UNSERVED,
    WAITING,
    idempotency_key,
    job_key,
    line_key,
    open_key,
    owned_key,
)
from app.jobs.record import Failure, Job, JobState, Origin, now
from app.jobs.settings import Settings
from app.jobs.tally import count_end, count_lost


class UnknownJobError(LookupError):
    """No record under this id: never made, or removed."""


class JobOverError(RuntimeError):
    """The job is no longer this worker's to write: cancelled, finished, removed, or started again elsewhere."""


class JobHeldError(RuntimeError):
    """The job's run is alive elsewhere."""


class JobStore:
    """Reads and changes job records. Every change is one optimistic transaction (WATCH, MULTI, EXEC) that looks at the
    state it starts from, so a cancelled job can never become running and two workers can never both finish one.

    All methods raise `redis.RedisError` when Redis does not answer.
    """

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self._redis = client
        self._admission = Admission(client, settings)
        self._leases = Leases(client, settings.lease)
        self._max_attempts = settings.max_attempts
        self._kept = {JobState.CANCELLED: settings.cancelled_kept}
        self._retention = settings.retention

    def ping(self) -> None:
        """Return if Redis answers."""
        self._redis.ping()

    def room(self, owner: str) -> None:
        """Return if a job of this owner would be let in now; raises as `create` does."""
        self._admission.refusal(owner)

    def create(self, job: Job) -> Job:
        """Write the record of a new job and put it at the end of the line. Gives back the job, or the one that the same
        request with the same Idempotency-Key made before.

        Raises `QueueFullError`, `TooManyJobsError`, `KeyReusedError`, and `UnknownJobError` if the earlier job was
        removed at this very moment.
        """
        job_id = self._admission.admit(job)
        return job if job_id == job.id else self.get(job_id)

    def get(self, job_id: str) -> Job:
        """The record. Raises `UnknownJobError`."""
        raw = cast("str | None", self._redis.get(job_key(job_id)))
        if raw is None:
            raise UnknownJobError(job_id)
        return Job.model_validate_json(raw)

    def exists(self, job_id: str) -> bool:
        """Whether there is a record."""
        return bool(self._redis.exists(job_key(job_id)))

    def of_owner(self, owner: str, before: int | None, count: int) -> tuple[list[Job], int | None]:
        """Up to `count` jobs of an owner, the latest first, beginning below the place `before` in the order of arrival;
        and the place to go on from, None at the end."""
        start = "+inf" if before is None else f"({before}"
        found = cast(
            "list[tuple[str, float]]",
            self._redis.zrevrangebyscore(owned_key(owner), start, "-inf", start=0, num=count + 1, withscores=True),
        )
        page = found[:count]
        raws = cast("list[str | None]", self._redis.mget([job_key(name) for name, _ in page])) if page else []
        jobs = [Job.model_validate_json(raw) for raw in raws if raw is not None]
        return jobs, int(page[-1][1]) if len(found) > count else None

    def position(self, job: Job) -> int | None:
        """1 for the job that is next in its line, 2 for the one after it; None for one that does not wait."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.zrank(line_key(Line.of(job).queue), job.id)
            pipe.zrank(WAITING, job.id)  # of an older version's, which is in no line
            ranks = cast("list[int | None]", pipe.execute())
        return next((rank + 1 for rank in ranks if rank is not None), None)

    def waiting(self) -> list[Job]:
        """All queued jobs, in order."""
        names = cast("list[str]", self._redis.zrange(WAITING, 0, -1))
        raws = cast("list[str | None]", self._redis.mget([job_key(name) for name in names])) if names else []
        jobs = [Job.model_validate_json(raw) for raw in raws if raw is not None]
        return [job for job in jobs if job.state is JobState.QUEUED]

    def depth(self) -> int:
        """Jobs that wait."""
        return self._redis.zcard(WAITING)

    def longest_waiting(self) -> float:
        """Seconds since the job that is next came into the queue; 0 if none waits."""
        first = cast("list[str]", self._redis.zrange(WAITING, 0, 0))
        try:
            return max(0.0, (now() - self.get(first[0]).queued).total_seconds()) if first else 0.0
        except UnknownJobError:  # removed in between
            return 0.0

    def since_taken(self) -> float | None:
        """Seconds since a worker took a job last; None if none ever did."""
        taken = cast("str | None", self._redis.get(TAKEN))
        return None if taken is None else max(0.0, clock(self._redis) - float(taken))

    def begin(self, job_id: str, worker: str) -> Job | None:
        """Take a job for this worker: state running, one more attempt, a new `run` and its lease. A job found running
        is taken only if its lease has lapsed. None: there is nothing to do, because the job is unknown, over or in
        live hands, or has now failed for having been started too often."""

        def free(job: Job, pipe: Pipeline) -> None:
            _unless_over(job, pipe)
            if job.state is JobState.RUNNING and self._leases.live(pipe, job.id, job.run, clock(pipe)):
                raise JobHeldError(job_id)

        def take(job: Job) -> Job:
            if job.attempts >= self._max_attempts:
                return job.model_copy(update=_given_up(job))
            return job.model_copy(
                update={
                    "state": JobState.RUNNING,
                    "attempts": job.attempts + 1,
                    "run": secrets.token_hex(8),
                    "worker": worker,
                    "started": job.started or now(),
                    "stage": "starting",
                    "percent": 0.0,
                }
            )

        try:
            job = self._change(job_id, free, take)
        except (UnknownJobError, JobOverError, JobHeldError):
            return None
        return job if job.state is JobState.RUNNING else None

    def renew(self, job: Job) -> None:
        """Say that a run is alive."""
        self._leases.renew(job.id, job.run)

    def process_ended(self, job_id: str, worker: str) -> None:
        """Say that the process of `worker` that ran the job is gone, so that the next one need not wait."""
        try:
            job = self.get(job_id)
        except UnknownJobError:
            return
        if job.state is JobState.RUNNING and job.worker == worker:
            self._leases.end(job.id, job.run)

    def lapsed(self) -> list[Lapsed]:
        """Runs whose worker has not been heard of for longer than a lease."""
        return self._leases.lapsed()

    def give_up(self, lapsed: Lapsed) -> Job | None:
        """Take a lapsed run from its worker: the job waits again, at the head of the line, or has failed for good if it
        was started too often. None if the run is over or has come to life meanwhile."""

        def still(job: Job, pipe: Pipeline) -> None:
            _unless_over(job, pipe)
            if job.state is not JobState.RUNNING or job.run != lapsed.run:
                raise JobOverError(job.id)
            if self._leases.live(pipe, job.id, job.run, clock(pipe)):
                raise JobHeldError(job.id)

        def back(job: Job) -> Job:
            return job.model_copy(update=_given_up(job) if job.attempts >= self._max_attempts else _again())

        try:
            return self._change(lapsed.job_id, still, back)
        except (UnknownJobError, JobOverError):
            self._leases.forget(lapsed)
        except JobHeldError:
            pass
        return None

    def live_runs(self) -> int:
        """Runs whose worker lives."""
        return self._leases.count()

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

    def succeed(
        self,
        job: Job,
        volumes_ml: dict[str, float],
        weights_sha256: str,
        *,
        seconds: Mapping[str, float] | None = None,
        warnings: Sequence[str] = (),
        origin: Origin | None = None,
        previewed: bool = False,
        dicom_seg: bool = False,
        probability_regions: Sequence[str] = (),
    ) -> Job:
        """End a run with its result; its files must be on the store already. `seconds`: how long each stage took.
        Raises `JobOverError`."""
        result = {
            "state": JobState.SUCCEEDED,
            "finished": now(),
            "stage": None,
            "percent": 100.0,
            "volumes_ml": volumes_ml,
            "weights_sha256": weights_sha256,
            "seconds": dict(seconds or {}),
            "warnings": tuple(warnings),
            "origin": origin,
            "previewed": previewed,
            "dicom_seg": dicom_seg,
            "probability_regions": tuple(probability_regions),
        }
        return self._change_run(job, lambda j: j.model_copy(update=result))

    def fail(self, job: Job, failure: Failure) -> Job:
        """End a run without one. Raises `JobOverError`."""
        return self._change_run(job, lambda j: j.model_copy(update=_failed(failure)))

    def fail_run_of(self, job_id: str, worker: str, failure: Failure) -> None:
        """End a job whose run died, in `worker`, with the process that knew its name. Does nothing to a job that is
        over, or in other hands."""

        def ours(job: Job, pipe: Pipeline) -> None:
            _unless_over(job, pipe)
            if job.state is not JobState.RUNNING or job.worker != worker:
                raise JobOverError(job.id)

        try:
            self._change(job_id, ours, lambda j: j.model_copy(update=_failed(failure)))
        except (UnknownJobError, JobOverError):
            return

    def fail_waiting(self, job_id: str, failure: Failure) -> bool:
        """End a job that waits; whether it still did."""

        def waits(job: Job, _pipe: Pipeline) -> None:
            if job.state is not JobState.QUEUED:
                raise JobOverError(job.id)

        try:
            self._change(job_id, waits, lambda j: j.model_copy(update=_failed(failure)))
        except (UnknownJobError, JobOverError):
            return False
        return True

    def hasten(self, job_id: str) -> Job | None:
        """Let a job of priority batch that waits count as interactive from now on; None if it does not wait so."""

        def waits(job: Job, _pipe: Pipeline) -> None:
            if job.state is not JobState.QUEUED or job.priority != "batch":
                raise JobOverError(job.id)

        try:
            return self._change(job_id, waits, lambda j: j.model_copy(update={"priority": "interactive"}))
        except (UnknownJobError, JobOverError):
            return None

    def release(self, job: Job) -> None:
        """Put a run back in the line because its worker is told to stop; this attempt does not count."""
        self._change_run(job, lambda j: j.model_copy(update=_again() | {"attempts": j.attempts - 1, "started": None}))

    def cancel(self, job_id: str) -> Job:
        """Cancel a job that is not over. Its record stays readable for a while, so that a worker and a reader both see
        what became of it. Raises `JobOverError` for one that is over, `UnknownJobError`."""
        over = {"state": JobState.CANCELLED, "finished": now(), "stage": None}
        return self._change(job_id, _unless_over, lambda j: j.model_copy(update=over))

    def expired(self) -> list[str]:
        """Ids of the jobs whose time is over."""
        return cast("list[str]", self._redis.zrangebyscore(ENDED, "-inf", clock(self._redis)))

    def remove(self, job_id: str) -> None:
        """Forget a job, and that its Idempotency-Key stood for it."""
        try:
            job = self.get(job_id)
        except UnknownJobError:
            job = None
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(job_key(job_id))
            for name in (WAITING, ENDED, MISSING, UNSERVED):
                pipe.zrem(name, job_id)
            if job is not None:
                pipe.zrem(line_key(Line.of(job).queue), job_id)
                self._leases.drop(pipe, job_id, job.run)
                pipe.zrem(owned_key(job.owner), job_id)
                pipe.srem(open_key(job.owner), job_id)
                if job.idempotency:
                    pipe.delete(idempotency_key(job.owner, job.idempotency))
            pipe.execute()

    def _change_run(self, job: Job, change: Callable[[Job], Job]) -> Job:
        def ours(current: Job, _pipe: Pipeline) -> None:
            if current.state is not JobState.RUNNING or current.run != job.run:
                raise JobOverError(job.id)

        try:
            return self._change(job.id, ours, change)
        except UnknownJobError as error:
            raise JobOverError(job.id) from error

    def _change(self, job_id: str, check: Callable[[Job, Pipeline], None], change: Callable[[Job], Job]) -> Job:
        """Replace a record by `change(record)` if `check(record)` does not raise, with nobody else in between."""
        key = job_key(job_id)

        def transaction(pipe: Pipeline) -> Job:
            raw = cast("str | None", pipe.get(key))
            if raw is None:
                raise UnknownJobError(job_id)
            before = Job.model_validate_json(raw)
            check(before, pipe)
            after = change(before)
            at = clock(pipe) if after.state is not before.state or after.run != before.run else 0.0
            place = pipe.incr(SEQUENCE) if after.priority != before.priority else 0
            pipe.multi()
            pipe.set(key, after.model_dump_json())
            if place:  # behind those that have the priority already
                _wait(pipe, after, place)
            self._follow(pipe, before, after, at)
            return after

        # redis-py's types know of callables that return nothing only.
        result = self._redis.transaction(cast(Any, transaction), key, value_from_callable=True)
        return cast(Job, result)

    def _follow(self, pipe: Pipeline, before: Job, after: Job, at: float) -> None:
        """Within the transaction that changes a record: everything else that depends on its state."""
        if before.state is JobState.RUNNING and (after.state is not JobState.RUNNING or after.run != before.run):
            self._leases.drop(pipe, before.id, before.run)
        if after.state is JobState.RUNNING and after.run != before.run:
            self._leases.grant(pipe, after.id, after.run, at)
            pipe.set(TAKEN, at)
            if before.state is JobState.RUNNING:
                count_lost(pipe)
        if after.state is before.state:
            return
        if after.state is JobState.QUEUED:
            # Back to the head of the line: it has waited already.
            _wait(pipe, after, 0)
            if after.attempts == before.attempts:
                count_lost(pipe)
        else:
            for name in (WAITING, MISSING, UNSERVED, line_key(Line.of(after).queue)):
                pipe.zrem(name, after.id)
        if after.state.final:
            pipe.zadd(ENDED, {after.id: at + self._kept.get(after.state, self._retention)})
            pipe.srem(open_key(after.owner), after.id)
            count_end(pipe, after)


def _wait(pipe: Pipeline, job: Job, place: int) -> None:
    """Within a transaction: a place among those of its priority."""
    for name in (WAITING, line_key(Line.of(job).queue)):
        pipe.zadd(name, {job.id: place + (LATER if job.priority == "batch" else 0)})


def _unless_over(job: Job, _pipe: Pipeline) -> None:
    if job.state.final:
        raise JobOverError(job.id)


def _again() -> dict[str, object]:
    return {"state": JobState.QUEUED, "queued": now(), "run": "", "worker": "", "stage": None, "percent": 0.0}


def _failed(failure: Failure) -> dict[str, object]:
    return {"state": JobState.FAILED, "finished": now(), "stage": None, "error": failure}


def _given_up(job: Job) -> dict[str, object]:
    """Enough: what ended so many processes is not tried on another one."""
    failure = Failure(
        kind="worker-lost",
        title="The worker was lost",
        detail=f"The process that worked on this job ended {job.attempts} times before it was done, probably for want "
        "of memory. A smaller volume or a larger worker may help.",
    )
    return {**_failed(failure), "quarantined": True}
