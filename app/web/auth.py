"""`Caller`: who is asking, by API key."""

from __future__ import annotations

from typing import Annotated

import structlog
from anyio.to_thread import run_sync
from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.web.problems import Problem
from app.web.service import Here

_bearer = HTTPBearer(
    scheme_name="API key",
    description="As `passion-server keys create NAME` printed it. Asked for unless the service is on loopback alone.",
    auto_error=False,
)


async def caller(service: Here, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> str:
    """The id of the key that was sent, "" where none is asked for. Raises `Problem` unauthorized.

    Looked up anew for each request: a key that is revoked ends at once. The body is not read before.
    """
    if not service.settings.guarded:
        return ""
    key = await run_sync(service.keys.verify, credentials.credentials) if credentials else None
    if key is None:
        # One answer for no key, a wrong, an expired and a revoked one: a stranger learns nothing from it.
        raise Problem(
            "unauthorized",
            "this needs an API key that is valid",
            "Send the header `Authorization: Bearer KEY`; the operator makes a KEY with `passion-server keys create`.",
            headers={"WWW-Authenticate": "Bearer"},
        )
    structlog.contextvars.bind_contextvars(key=key.id)
    return key.id


Caller = Annotated[str, Depends(caller)]
"""The id of the caller's API key as a route's argument; "" where the service asks for none."""
