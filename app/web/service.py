"""`Service`: what the routes work with, made once per process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

import anyio
from fastapi import Depends, Request

from app.jobs.blobs import Blobs
from app.jobs.bucket_store import blobs_of
from app.jobs.cards import ModelShelf
from app.jobs.connection import connect
from app.jobs.gpu import Gpus
from app.jobs.keys import KeyStore
from app.jobs.presence import Presence
from app.jobs.queue import JobQueue
from app.jobs.settings import Settings
from app.jobs.store import JobStore
from app.jobs.tally import Tally
from app.jobs.traces import Traces
from app.web.meters import Meters

TURNS = 2
"""Enough that one can be parsed while another is written."""


@dataclass(frozen=True)
class Service:
    """Stores, queue and limits of one API process."""

    settings: Settings
    jobs: JobStore
    blobs: Blobs
    queue: JobQueue
    presence: Presence
    models: ModelShelf
    tally: Tally
    gpus: Gpus
    meters: Meters
    traces: Traces
    keys: KeyStore
    uploads: anyio.CapacityLimiter
    """Requests that may be sending images."""
    turns: anyio.CapacityLimiter
    """Uploads of which a piece that has come is being parsed and written. The others wait, and by TCP so do their
    senders. Else a reader of a job would wait, several times over, for as long as a piece of each of fifty takes."""
    writing: anyio.CapacityLimiter
    """Threads that write uploads. Their own, so that a reader of a job never waits behind fifty uploads."""
    checking: anyio.CapacityLimiter
    """Threads that read uploads through: work for a processor, so few."""
    looking: anyio.CapacityLimiter
    """Threads that look at jobs for readers of events."""
    streams: anyio.CapacityLimiter
    """Readers of events."""

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Everything from the settings; connects to nothing yet."""
        client = connect(settings)
        return cls(
            settings=settings,
            jobs=JobStore(client, settings),
            blobs=blobs_of(settings),
            queue=JobQueue(settings),
            presence=Presence(client),
            models=ModelShelf(settings.models, settings.default_model),
            tally=Tally(client),
            gpus=Gpus(client),
            meters=Meters(),
            traces=Traces("passion-api"),
            keys=KeyStore(client),
            uploads=anyio.CapacityLimiter(settings.uploads),
            turns=anyio.CapacityLimiter(TURNS),
            writing=anyio.CapacityLimiter(16),
            checking=anyio.CapacityLimiter(settings.checks),
            looking=anyio.CapacityLimiter(4),
            streams=anyio.CapacityLimiter(settings.streams),
        )


async def _service(request: Request) -> Service:
    # A coroutine only because FastAPI sends each plain function into a thread, once per request.
    service: Service = request.app.state.service
    return service


Here = Annotated[Service, Depends(_service)]
"""The process's `Service`, as a route's argument."""
