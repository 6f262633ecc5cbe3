"""`Traces`: where a job's time went, as OpenTelemetry spans for whoever collects them. Ids and figures only, as in the
logs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

log = structlog.get_logger("app.jobs")

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""OpenTelemetry's own variable; its others (headers, time-outs, sampling) are read by its packages."""

LAST_WORDS = 2.0
"""Seconds that a process which ends waits for its last spans to be sent."""

_span: ContextVar[tuple[Tracer, Span] | None] = ContextVar("span", default=None)


class Traces:
    """Off, and then free, unless `ENDPOINT` is set and OpenTelemetry is installed (extra `traces`)."""

    def __init__(self, service: str) -> None:
        self._provider = _provider(service) if os.environ.get(ENDPOINT) else None

    @contextmanager
    def span(self, name: str, parent: str = "", **attributes: str | int) -> Iterator[None]:
        """What is done inside; `parent` is a `traceparent` of another process."""
        if self._provider is None:
            yield
            return
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        tracer = self._provider.get_tracer("passion")
        above = TraceContextTextMapPropagator().extract({"traceparent": parent})
        # Not OpenTelemetry's own `with`: that records an exception's words, which may quote a header or a path.
        span = tracer.start_span(name, above, attributes=_named(attributes))
        token = _span.set((tracer, span))
        try:
            yield
        finally:
            _span.reset(token)
            span.end()

    def close(self) -> None:
        """Send what has not been sent. A collector that is away holds nobody up for long."""
        if self._provider is not None:
            sending = threading.Thread(target=self._provider.shutdown, daemon=True)
            sending.start()
            sending.join(LAST_WORDS)


def note(**attributes: str | int) -> None:
    """Add to the span that is on, if any."""
    if (on := _span.get()) is not None:
        on[1].set_attributes(_named(attributes))


def stage_ended(stage: str, seconds: float) -> None:
    """A part of the span that is on, if any, has ended just now."""
    if (on := _span.get()) is not None:
        from opentelemetry.trace import set_span_in_context

        tracer, span = on
        end = time.time_ns()
        tracer.start_span(stage, set_span_in_context(span), start_time=end - int(seconds * 1e9)).end(end)


def traceparent() -> str:
    """W3C's name of the span that is on, for another process; empty if none is."""
    if (on := _span.get()) is None:
        return ""
    context = on[1].get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def _named(attributes: dict[str, str | int]) -> dict[str, str | int]:
    return {f"passion.{name}": value for name, value in attributes.items()}


def _provider(service: str) -> TracerProvider | None:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning(f"{ENDPOINT} is set, but OpenTelemetry is not installed (extra `traces`): no traces")
        return None
    provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
