"""`events_of`: a job as a stream of what changes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
from anyio.to_thread import run_sync

from app.jobs.record import Job
from app.jobs.store import UnknownJobError
from app.web.problems import Problem
from app.web.resources import JobResource
from app.web.service import Here, Service
from app.web.standing import Standing

PAUSE = 0.5
"""Seconds between two looks at a record; as often as a worker writes how far it is."""


async def stream_slot(service: Here) -> AsyncIterator[None]:
    """A place among the readers of events, for as long as the answer lasts. Raises `Problem`."""
    reader = object()
    try:
        service.streams.acquire_on_behalf_of_nowait(reader)
    except anyio.WouldBlock:
        raise Problem(
            "too-many-streams",
            f"{service.settings.streams} readers follow job events, which is as many as may",
            "Poll the job instead, or try again later.",
            headers={"Retry-After": "10"},
        ) from None
    try:
        yield
    finally:
        service.streams.release_on_behalf_of(reader)


async def events_of(job: Job, service: Service) -> AsyncIterator[JobResource]:
    """The job now and after each change, until it is over or removed."""
    shown: JobResource | None = None
    while True:
        resource = await run_sync(_look, job, service, limiter=service.looking)
        if resource is None:
            return
        if resource != shown:
            shown = resource
            yield resource
        if resource.state.final:
            return
        await anyio.sleep(PAUSE)


def _look(job: Job, service: Service) -> JobResource | None:
    try:
        record = service.jobs.get(job.id)
    except UnknownJobError:
        return None
    return JobResource.of(record, Standing.of(record, service))
