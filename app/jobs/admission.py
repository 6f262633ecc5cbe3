"""`Admission`: the one step in which an upload becomes a job, or is turned away."""

from __future__ import annotations

from typing import cast

import redis

from app.jobs.lines import Line
from app.jobs.names import LATER, SEQUENCE, WAITING, idempotency_key, job_key, line_key, open_key, owned_key
from app.jobs.record import Job
from app.jobs.settings import Settings
from app.jobs.tally import ACCEPTED, COUNTS

# A script, because fifty uploads that end at once would make each other's transactions fail again and again.
_ADMIT = """
local record, owned, open, sequence, waiting, known, counts, line = unpack(KEYS)
local id, json, most_waiting, most_open, idempotent, fingerprint, accepted, later = unpack(ARGV)
if idempotent == '1' then
  local job = redis.call('HGET', known, 'job')
  if job then
    return {redis.call('HGET', known, 'fingerprint') == fingerprint and 'same' or 'other', job}
  end
end
if redis.call('ZCARD', waiting) >= tonumber(most_waiting) then return {'full', ''} end
if tonumber(most_open) > 0 and redis.call('SCARD', open) >= tonumber(most_open) then return {'many', ''} end
local place = redis.call('INCR', sequence)
redis.call('SET', record, json)
redis.call('ZADD', waiting, place + later, id)
redis.call('ZADD', line, place + later, id)
redis.call('ZADD', owned, place, id)
redis.call('SADD', open, id)
redis.call('HINCRBY', counts, accepted, 1)
if idempotent == '1' then redis.call('HSET', known, 'job', id, 'fingerprint', fingerprint) end
return {'new', id}
"""


class QueueFullError(RuntimeError):
    """As many jobs wait as may."""


class TooManyJobsError(RuntimeError):
    """As many jobs of this owner wait or run as may."""


class KeyReusedError(ValueError):
    """The Idempotency-Key stands for another request already."""


class Admission:
    """Writes the record of a new job and puts it at the end of the line, if the limits let it in. All of it at once, so
    that limits hold however many uploads end at the same time. An owner without a name has no limit of its own."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self._redis = client
        self._most_waiting = settings.queue_limit
        self._most_open = settings.jobs_per_key
        self._admit = client.register_script(_ADMIT)

    def refusal(self, owner: str) -> None:
        """Raise what `admit` would raise now, before anything is sent in vain."""
        if self._redis.zcard(WAITING) >= self._most_waiting:
            raise QueueFullError
        if owner and self._redis.scard(open_key(owner)) >= self._most_open:
            raise TooManyJobsError

    def admit(self, job: Job) -> str:
        """The id of the job: `job`'s own, or that of the job which the same request made before.

        Raises `QueueFullError`, `TooManyJobsError`, `KeyReusedError`."""
        keys = [
            *(job_key(job.id), owned_key(job.owner), open_key(job.owner), SEQUENCE, WAITING),
            *(idempotency_key(job.owner, job.idempotency), COUNTS, line_key(Line.of(job).queue)),
        ]
        limits = [self._most_waiting, self._most_open if job.owner else 0]
        args: list[str | int] = [
            job.id,
            job.model_dump_json(),
            *limits,
            int(bool(job.idempotency)),
            job.fingerprint,
            ACCEPTED,
            LATER if job.priority == "batch" else 0,
        ]
        answer, job_id = cast("tuple[str, str]", self._admit(keys=keys, args=args))
        if answer == "full":
            raise QueueFullError
        if answer == "many":
            raise TooManyJobsError
        if answer == "other":
            raise KeyReusedError
        return job_id
