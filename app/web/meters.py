"""`Meters`: what one API process counts of itself."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    disable_created_metrics,
)
from prometheus_client.process_collector import ProcessCollector

# Half as many series again, which nobody asks for.
disable_created_metrics()

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER = "other"
BOUNDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Meters:
    """Counters in a registry of their own, so that several applications may live in one process. No label holds what a
    client made up: that would be a new series per request."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.uploads_in_flight = Gauge(
            "passion_uploads_in_flight",
            "Uploads that this process is receiving or checking.",
            registry=self.registry,
        )
        self._upload_bytes = Counter(
            "passion_upload_bytes", "Bytes of request bodies that this process has read.", registry=self.registry
        )
        self._refused = Counter(
            "passion_uploads_refused",
            "Uploads that this process has refused, by kind of problem.",
            ["kind"],
            registry=self.registry,
        )
        self._requests = Counter(
            "passion_http_requests",
            "Requests that this process has answered, by the route's pattern; status 0: the client left before.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "passion_http_request_seconds",
            "Seconds from a request's head to the end of its answer; for events that is as long as they are read.",
            ["route"],
            buckets=BOUNDS,
            registry=self.registry,
        )

    def received(self, size: int) -> None:
        """Some bytes of a request's body were read."""
        self._upload_bytes.inc(size)

    def refused(self, kind: str) -> None:
        """An upload was refused."""
        self._refused.labels(kind).inc()

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request is over. `route` is the pattern, never the address."""
        self._requests.labels(method if method in METHODS else OTHER, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
