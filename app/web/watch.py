"""`watched`: an upload as those see it who watch the service: how many there are, how long they take, why they are
refused."""

from __future__ import annotations

from collections.abc import AsyncIterator

import structlog
from redis import RedisError

from app.jobs.bucket import StoreAwayError
from app.jobs.traces import note
from app.web.problems import Problem
from app.web.service import Here

log = structlog.get_logger("app.web")


async def watched(service: Here) -> AsyncIterator[None]:
    """Around the route that receives uploads."""
    with service.meters.uploads_in_flight.track_inprogress(), service.traces.span("POST /segment"):
        try:
            yield
        except (Problem, RedisError, StoreAwayError) as error:
            kind = error.kind if isinstance(error, Problem) else "unavailable"
            service.meters.refused(kind)
            log.info("upload refused", kind=kind)
            note(state="refused", problem=kind)
            raise
