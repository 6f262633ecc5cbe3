"""`Connection`: uvicorn's HTTP/1.1 protocol, with an end to what a client can draw out outside a request's body."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from app.jobs.settings import Settings
from app.web.headers import EVERYWHERE
from app.web.problems import Problem, busy


class Connection(H11Protocol):
    """Bounds the time of a request's head and of an answer that is not taken, and the number of connections.

    uvicorn has a limit for connections that idle between two requests and none for these: a head of which a byte comes
    every second holds its connection for ever, and so does an answer of which a byte is read every second. Its limit on
    connections answers in plain text; it is left alone.

    It rests on h11 because that also bounds a head's size, and is Python where the hostile bytes are. httptools with
    uvloop takes uploads a fifth faster (twenty of 10 MB side by side on two cores: 231 against 192 MB/s), but both are
    faster than the networks in front of them.
    """

    idle_timeout = 30.0
    most = 512

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head: asyncio.TimerHandle | None = None
        self._answer: asyncio.TimerHandle | None = None

    # As uvicorn's own class has it, narrower than asyncio's.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._refuse(busy(f"{self.most} connections are open already"))
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._head_is_here()
        self._answer_is_taken()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Bytes have come; a new cycle means that with them a head is complete."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._head_is_here()

    def on_response_complete(self) -> None:
        """The answer is handed over to the transport: the next head may come, and what is left must be taken."""
        self._await_head()
        super().on_response_complete()
        self._await_answer()

    def pause_writing(self) -> None:
        """The client takes its answer more slowly than we write it."""
        super().pause_writing()
        self._await_answer()

    def resume_writing(self) -> None:
        """It has taken what lay there."""
        super().resume_writing()
        self._answer_is_taken()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets a problem document too."""
        self._refuse(Problem("not-http", msg))

    def _await_head(self) -> None:
        self._head_is_here()
        self._head = self.loop.call_later(self.idle_timeout, self.transport.close)

    def _head_is_here(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _await_answer(self) -> None:
        self._answer_is_taken()
        if self.transport.get_write_buffer_size():
            self._answer = self.loop.call_later(self.idle_timeout, self._abort_unless_taken)

    def _answer_is_taken(self) -> None:
        if self._answer is not None:
            self._answer.cancel()
            self._answer = None

    def _abort_unless_taken(self) -> None:
        # `abort`, because `close` waits until the client has taken what is left.
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _refuse(self, problem: Problem) -> None:
        """Answer without a request, and close."""
        response = problem.response()
        lines = [b"HTTP/1.1 %d %s" % (problem.status, problem.status.phrase.encode()), b"connection: close"]
        lines += [name + b": " + value for name, value in (*response.raw_headers, *EVERYWHERE)]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        self.transport.close()


def connection_of(settings: Settings) -> type[Connection]:
    """`Connection` with the limits of `settings`."""
    limits = {"idle_timeout": settings.idle_timeout, "most": settings.connections}
    return type("Connection", (Connection,), limits)
