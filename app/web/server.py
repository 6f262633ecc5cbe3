"""`server_config`: the server around the application, the same for the command and for tests."""

from __future__ import annotations

import uvicorn

from app.jobs.settings import Settings
from app.web.application import create_asgi
from app.web.connection import connection_of


def server_config(settings: Settings) -> uvicorn.Config:
    """uvicorn's configuration for `settings`."""
    return uvicorn.Config(
        create_asgi(settings),
        host=settings.host,
        port=settings.port,
        http=connection_of(settings),
        # By default whichever is installed; this is the one that `Connection` is tested on.
        loop="asyncio",
        # None is served, and a WebSocket goes past what looks at HTTP requests.
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, int(settings.stop_grace)),
    )
