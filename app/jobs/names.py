"""What our keys in Redis are called, all in one place."""

from __future__ import annotations

SEQUENCE = "passion:sequence"
"""Counter: the order in which jobs were accepted."""

WAITING = "passion:waiting"
"""Sorted set of the queued jobs by order of arrival, those of priority batch `LATER`: Celery's own lists hold messages,
which may be lost or doubled."""
LATER = 10**12
"""More than there ever will be jobs, and little enough to be added to one's number exactly."""

ENDED = "passion:ended"
"""Sorted set of the jobs that are over, by the time (seconds, Redis's clock) at which they are to be removed."""

MISSING = "passion:missing"
"""Sorted set of the queued jobs that no message speaks of, by the time at which that was seen first."""

TAKEN = "passion:taken"
"""When (seconds, Redis's clock) a worker took a job last."""


UNSERVED = "passion:unserved"
"""Sorted set of the queued jobs that no worker serves, by the time at which that was seen first."""


def line_key(queue: str) -> str:
    """Sorted set of the jobs that wait in a line, as `WAITING`."""
    return f"passion:line:{queue}"


def job_key(job_id: str) -> str:
    """The record of a job, JSON."""
    return f"passion:job:{job_id}"


def owned_key(owner: str) -> str:
    """Sorted set of an owner's jobs by order of arrival."""
    return f"passion:owned:{owner}"


def open_key(owner: str) -> str:
    """Set of an owner's jobs that are not over."""
    return f"passion:open:{owner}"


def idempotency_key(owner: str, idempotency: str) -> str:
    """Hash of the job that an owner's Idempotency-Key stands for, and of its fingerprint."""
    return f"passion:idempotency:{owner}:{idempotency}"
