"""`SecurityHeaders`: what every answer tells a browser."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

EVERYWHERE: tuple[tuple[bytes, bytes], ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    # Concerns requests that no CORS rule sees (images, scripts); where `cors_origins` lets a page in, this lets it too.
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)
_PATIENTS = ("/segment", "/jobs")
"""Whose answers are about a patient and must lie in no cache."""


class SecurityHeaders:
    """Adds them to every answer that does not bring its own, errors of ours included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        wanted = EVERYWHERE
        if scope["path"].startswith(_PATIENTS):
            wanted = (*EVERYWHERE, (b"cache-control", b"no-store"))

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = message.get("headers", [])
                names = {name.lower() for name, _ in own}
                message = {**message, "headers": [*own, *(pair for pair in wanted if pair[0] not in names)]}
            await send(message)

        await self._app(scope, receive, with_headers)
