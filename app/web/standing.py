"""`Standing`: how a job stands that waits."""

from __future__ import annotations

from typing import NamedTuple

from app.jobs.lines import Line
from app.jobs.record import Job, JobState
from app.web.service import Service


class Standing(NamedTuple):
    """Of a job that does not wait there is nothing to say."""

    position: int | None = None
    """1 is next in its line."""
    waiting_for: str | None = None
    """Who is missing, where no worker serves its line."""

    @classmethod
    def of(cls, job: Job, service: Service) -> Standing:
        """As it is now. Raises `redis.RedisError`."""
        if job.state is not JobState.QUEUED:
            return cls()
        line = Line.of(job)
        served = line.queue in service.presence.served()
        return cls(service.jobs.position(job), None if served else line.server)
