"""`GET /metrics`: what goes on, in Prometheus's words. What is about jobs comes from Redis, so that every API process
tells the same; the rest is this process's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from typing import get_args

from fastapi import APIRouter, Depends, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from redis import RedisError

from app.jobs.record import FailureKind, JobState
from app.jobs.tally import BOUNDS, Counted, Histogram
from app.web.auth import caller
from app.web.problems import problems_of
from app.web.service import Here, Service

router = APIRouter(dependencies=[Depends(caller)], responses=problems_of("unauthorized", "unavailable"))

STAGES = ("waiting", "loading", "preparing", "normalising", "segmenting", "restoring", "saving", "all")
ENDS = [
    (JobState.SUCCEEDED, ""),
    (JobState.CANCELLED, ""),
    *((JobState.FAILED, kind) for kind in get_args(FailureKind)),
]
"""Every way in which a job can end: told from the start, because a rate needs the 0 before the first 1."""


class Jobs(Collector):
    """Asks Redis at each scrape. If it does not answer, that is all there is to tell."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client has it."""
        streams = self._service.streams.borrowed_tokens
        yield _gauge("event_streams", "Readers of job events at this process.", streams)
        try:
            found = [*self._counted(self._service.tally.read()), *self._now()]
        except RedisError:
            found = []
        yield _gauge("redis_up", "Whether Redis answered.", int(bool(found)))
        yield from found

    def _counted(self, counted: Counted) -> Iterator[Metric]:
        yield _counter("jobs_accepted", "Jobs accepted.", counted.accepted)
        ended = CounterMetricFamily(
            "passion_jobs_ended", "Jobs that are over, by final state and kind of failure.", labels=["state", "reason"]
        )
        for labels in dict.fromkeys([*ENDS, *counted.ended]):
            ended.add_metric(labels, counted.ended.get(labels, 0))
        yield ended
        yield _counter("runs_lost", "Runs whose worker was lost.", counted.lost)
        yield _counter("messages_resent", "Messages sent again because none spoke of a waiting job.", counted.resent)
        seconds = HistogramMetricFamily(
            "passion_job_stage_seconds",
            "Seconds of the jobs that are over, by stage: waiting and all of every job, the others of those that "
            "succeeded.",
            labels=["stage"],
        )
        for stage in dict.fromkeys([*STAGES, *counted.seconds]):
            histogram = counted.seconds.get(stage, Histogram())
            upto = accumulate(histogram.counts[bound] for bound in BOUNDS)
            buckets = list(zip(map(floatToGoString, BOUNDS), upto, strict=True))
            seconds.add_metric([stage], buckets, histogram.total)
        yield seconds

    def _now(self) -> Iterator[Metric]:
        jobs, workers = self._service.jobs, self._service.presence.workers()
        yield _gauge("queue_depth", "Jobs that wait.", jobs.depth())
        lines = GaugeMetricFamily(
            "passion_line_depth", "Jobs that wait, by line.", labels=["model", "needs", "priority"]
        )
        for labels, count in Counter((job.model, job.needs, job.priority) for job in jobs.waiting()).items():
            lines.add_metric(labels, count)
        yield lines
        yield _gauge("queue_oldest_seconds", "Seconds that the job at the head waits.", jobs.longest_waiting())
        yield _gauge("jobs_running", "Jobs in the hands of a worker that lives.", jobs.live_runs())
        yield _gauge("workers", "Workers that take jobs off the queue.", len(workers))
        children = sum(worker.children for worker in workers)
        yield _gauge("worker_children", "Jobs that those workers can run at the same time.", children)
        memory = GaugeMetricFamily(
            "passion_gpu_memory_bytes",
            "Memory of a worker's CUDA device after its last job: held by it, the most it has held, and all there is.",
            labels=["worker", "device", "kind"],
        )
        for device in self._service.gpus.read():
            for kind, size in (("reserved", device.reserved), ("peak", device.peak), ("total", device.total)):
                memory.add_metric([device.worker, device.device, kind], size)
        yield memory


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"passion_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"passion_{name}", text, value=value)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"description": "Prometheus's text format.", "content": {"text/plain": {}}}},
    tags=["health"],
)
def metrics(service: Here) -> Response:
    """Counters and gauges for Prometheus: of all jobs, and of this process. Answers without Redis, too."""
    of_jobs = CollectorRegistry()
    of_jobs.register(Jobs(service))
    text = generate_latest(of_jobs) + generate_latest(service.meters.registry)
    return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)
