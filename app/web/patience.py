"""`Patience`: how long a request's body is waited for, and how many are received at a time."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.jobs.settings import Settings
from app.web.problems import Problem, busy
from app.web.service import Here


class Patience:
    """Ends the wait for a body that comes too slowly, with a `Problem` where the body is being read.

    Only waiting counts as idle, not what we do between two reads. What a connection does before its request is
    complete, and while it takes its answer, is the business of `Connection`.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._idle = settings.idle_timeout
        self._whole = settings.upload_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        end = time.monotonic() + self._whole
        more = True

        async def timely() -> Message:
            nonlocal more
            if not more:  # whoever listens now waits for the client to leave, and may wait long
                return await receive()
            with anyio.move_on_after(min(self._idle, end - time.monotonic())):
                message = await receive()
                more = message["type"] == "http.request" and message.get("more_body", False)
                return message
            raise Problem(
                "too-slow",
                f"the body took longer than {self._whole:g} s, or {self._idle:g} s went by without a byte",
                "Send it again over a faster line.",
            )

        await self._app(scope, timely, send)


async def one_upload(service: Here) -> AsyncIterator[None]:
    """A place among the uploads that are received at a time, for the length of a request. Raises `Problem` busy.

    Nobody waits for a place: a queue of connections is what the limit is there to prevent.
    """
    place = object()
    try:
        service.uploads.acquire_on_behalf_of_nowait(place)
    except anyio.WouldBlock:
        raise busy(f"{service.settings.uploads} uploads are being received already") from None
    try:
        yield
    finally:
        service.uploads.release_on_behalf_of(place)
