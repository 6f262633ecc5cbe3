"""`Form`: a multipart/form-data body as a stream of parts. Nothing is spooled; a part's bytes pass once, in pieces."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

MAX_PARTS = 64
MAX_HEADERS = 8
"""Of one part. Browsers and libraries send one to three."""
MAX_HEADER_BYTES = 4096
"""Of one header, name and value: a file name has 255 bytes at most."""


class MalformedFormError(ValueError):
    """The body is no multipart/form-data. The message says where it stops being one."""


@dataclass(frozen=True)
class PartBegins:
    """A part's headers are complete. `filename` is only told from None and from nothing; its text goes nowhere."""

    name: str
    is_file: bool
    is_blank_choice: bool
    """A file field in which a browser's user chose nothing."""


@dataclass(frozen=True)
class PartData:
    """Some bytes of the current part."""

    data: bytes


@dataclass(frozen=True)
class PartEnds:
    """The current part is complete."""


Event = PartBegins | PartData | PartEnds


def boundary(content_type: str | None) -> bytes | None:
    """The boundary in a Content-Type header of multipart/form-data; None for any other."""
    kind, options = parse_options_header(content_type)
    return (options.get(b"boundary") or None) if kind == b"multipart/form-data" else None


class Form:
    """Parses a body as it arrives."""

    def __init__(self, boundary: bytes) -> None:
        self._events: list[Event] = []
        self._header = bytearray()
        self._value = bytearray()
        self._disposition = ""
        self._parts = 0
        self._headers = 0
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part_begin,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._part_data,
                    "on_part_end": self._part_end,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise MalformedFormError("the boundary is too long") from error

    async def events(self, body: AsyncIterator[bytes]) -> AsyncGenerator[Event, None]:
        """The parts of `body` in order. Raises `MalformedFormError`, also when its end is missing."""
        async for chunk in body:
            try:
                self._parser.write(chunk)
            except FormParserError as error:
                raise MalformedFormError("a boundary or a part's header is not as it must be") from error
            events, self._events = self._events, []
            for event in events:
                yield event
        if not self._ended:
            raise MalformedFormError("the body ends before its closing boundary")

    def _part_begin(self) -> None:
        self._parts += 1
        self._headers = 0
        self._disposition = ""
        if self._parts > MAX_PARTS:
            raise MalformedFormError(f"the form has more than {MAX_PARTS} parts")

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._bound_header(end - start)
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._bound_header(end - start)
        self._value += data[start:end]

    def _bound_header(self, more: int) -> None:
        # The parser has bounds of its own, but not in all the versions that will do.
        if len(self._header) + len(self._value) + more > MAX_HEADER_BYTES:
            raise MalformedFormError(f"a part has a header of more than {MAX_HEADER_BYTES} bytes")

    def _header_end(self) -> None:
        self._headers += 1
        if self._headers > MAX_HEADERS:
            raise MalformedFormError(f"a part has more than {MAX_HEADERS} headers")
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = self._value.decode("latin-1")
        self._header.clear()
        self._value.clear()

    def _headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        name = options.get(b"name")
        if kind != b"form-data" or name is None:
            raise MalformedFormError("a part has no Content-Disposition: form-data with a name")
        filename = options.get(b"filename")
        self._events.append(PartBegins(name.decode("utf-8", "replace"), filename is not None, filename == b""))

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._events.append(PartData(data[start:end]))

    def _part_end(self) -> None:
        self._events.append(PartEnds())

    def _end(self) -> None:
        self._ended = True
