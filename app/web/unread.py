"""`UnreadBody`: what becomes of a request's body when the answer is ready before the body has ended."""

from __future__ import annotations

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

DRAIN_BYTES = 32 << 20
DRAIN_SECONDS = 5.0


class UnreadBody:
    """Answers at once, lets a refused body run out, within bounds, and closes the connection.

    A connection closed on a sender in full flow is reset, and the answer that says what was wrong is lost on the way.
    So the rest is read and dropped first, after the answer and before the connection is closed. But a server that goes
    on reading can be kept busy for ever by a chunked body without end: past the bounds it is closed all the same.
    """

    def __init__(self, app: ASGIApp, turns: anyio.CapacityLimiter) -> None:
        """`turns`: of the uploads on the event loop, in which what is dropped must wait as well."""
        self._app = app
        self._turns = turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        unread = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        refused = False

        async def watched_receive() -> Message:
            nonlocal unread
            message = await receive()
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                unread = False
            return message

        async def watched_send(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start":
                refused = unread
                if refused:
                    message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            # Who asks first (Expect: 100-continue) has not begun to send, and must not be told to.
            elif refused and b"expect" not in headers and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await drain()
                message = {"type": "http.response.body"}
            await send(message)

        async def drain() -> None:
            left = DRAIN_BYTES
            with anyio.move_on_after(DRAIN_SECONDS):
                while unread and left > 0:
                    message = await watched_receive()
                    async with self._turns:
                        left -= len(message.get("body", b""))

        await self._app(scope, watched_receive, watched_send)
