"""`create_app`: the FastAPI application."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.jobs.logs import configure
from app.jobs.record import is_id
from app.jobs.settings import Settings, is_loopback
from app.web import job_routes, metrics, problems, result_routes
from app.web.document import document
from app.web.headers import SecurityHeaders
from app.web.housekeeping import Housekeeping
from app.web.meters import Meters
from app.web.origin import OwnHosts, OwnPages, shared_with
from app.web.pages import pages
from app.web.patience import Patience
from app.web.resources import NOTICE
from app.web.routes import public, router
from app.web.service import Service
from app.web.unread import UnreadBody
from app.web.version import version

log = structlog.get_logger("app.web")

DESCRIPTION = f"""Segments MRI volumes, brain tumours first of all, when some of the modalities are missing.

Send any non-empty subset of a model's modalities to `POST /segment`, poll the job, fetch the mask. Errors are problem
documents (RFC 9457) that name the field and the remedy.

**{NOTICE}**"""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application for `settings`, by default those of the environment."""
    settings = settings or Settings()
    configure(settings)
    service = Service.of(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.blobs.open()
        housekeeping = Housekeeping(settings, service.blobs)
        housekeeping.start()
        threading.Thread(target=service.queue.open, name="celery import", daemon=True).start()
        log.info("api started", models=service.models.names(), keys=settings.guarded)
        if not settings.guarded and not is_loopback(settings.host):
            log.warning("no key is asked for, and not only this machine can ask")
        yield
        housekeeping.stop()
        service.queue.close()
        service.traces.close()
        log.info("api stopped")

    # The pages about the API are our own: FastAPI's load scripts from elsewhere.
    app = FastAPI(
        title="PASSION Seg",
        version=version(),
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        # The names of operations: the links of the document speak of them, and so do clients made from it.
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.service = service
    app.include_router(job_routes.router)
    app.include_router(result_routes.router)
    app.include_router(router)
    app.include_router(metrics.router)
    app.include_router(public)
    app.include_router(pages)
    problems.install(app)
    # FastAPI documents replacing this method as the way to change its description; to a type checker it is a method.
    app.openapi = lambda: document(app, service)  # type: ignore[method-assign]
    return app


def create_asgi(settings: Settings | None = None) -> ASGIApp:
    """The application as a server runs it. Around it goes what must see every answer, that of an error of ours too.

    From the outside in: the name it was called by, pages of other origins, and only then routes, which ask for the key.
    """
    settings = settings or Settings()
    service_app = create_app(settings)
    service: Service = service_app.state.service
    app: ASGIApp = Patience(service_app, settings)
    app = OwnHosts(shared_with(OwnPages(app, settings), settings), settings)
    return UnreadBody(RequestLog(SecurityHeaders(app), service.meters), service.turns)


class RequestLog:
    """One log line per request, and its place in the counts: the route's pattern rather than the address, where a
    client may write what it likes."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self._app = app
        self._meters = meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        structlog.contextvars.clear_contextvars()
        start, status = time.perf_counter(), 0

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def count() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                self._meters.received(len(message.get("body", b"")))
            return message

        try:
            await self._app(scope, count, watch)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            seconds = time.perf_counter() - start
            self._meters.answered(scope["method"], route, status, seconds)
            if route not in {"/livez", "/readyz", "/metrics"}:
                job = {"job_id": job_id} if is_id(job_id := scope.get("path_params", {}).get("job_id", "")) else {}
                log.info(
                    "request", method=scope["method"], route=route, status=status, ms=round(1000 * seconds, 1), **job
                )
