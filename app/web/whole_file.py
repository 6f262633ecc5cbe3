"""`WholeFile`: a file as an answer, never a part of it."""

from __future__ import annotations

from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send


class WholeFile(FileResponse):
    """Starlette's answer, deaf to `Range`: a part that cannot be had would be refused in plain text, where every error
    of ours is a problem document. The files are small, and HTTP lets a server give the whole."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        self.headers["accept-ranges"] = "none"
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)
