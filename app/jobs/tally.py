"""`Tally`: what has happened to all jobs so far, counted in Redis in the very transactions in which it happens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import redis
from redis.client import Pipeline

from app.jobs.record import Job

COUNTS = "passion:counts"
"""Hash of counters; a field is a name and its labels, joined by `|`."""

SECONDS = "passion:seconds"
"""Hash of histograms: `<stage>|<upper bound>` counts the jobs up to that bound and above the one before it, and
`<stage>|sum` adds up the seconds."""

ACCEPTED = "accepted"
ENDED = "ended"
LOST = "lost"
RESENT = "resent"
BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, float("inf"))


@dataclass
class Histogram:
    """Durations of one stage."""

    counts: dict[float, int] = field(default_factory=lambda: dict.fromkeys(BOUNDS, 0))
    """Jobs by upper bound, seconds, each counted once."""
    total: float = 0.0
    """Seconds in all."""


@dataclass(frozen=True)
class Counted:
    """All of it at one moment."""

    accepted: int
    ended: dict[tuple[str, str], int]
    """By final state and kind of failure (empty for none)."""
    lost: int
    """Runs whose worker was lost."""
    resent: int
    """Messages that were sent again because none spoke of a waiting job."""
    seconds: dict[str, Histogram]
    """By stage."""


def count_lost(pipe: Pipeline) -> None:
    """Within a transaction: a run was taken for lost."""
    pipe.hincrby(COUNTS, LOST, 1)


def count_end(pipe: Pipeline, job: Job) -> None:
    """Within the transaction that ends a job."""
    pipe.hincrby(COUNTS, f"{ENDED}|{job.state}|{job.error.kind if job.error else ''}", 1)
    spans = dict(job.seconds)
    if job.started:
        spans["waiting"] = (job.started - job.created).total_seconds()
    if job.finished:
        spans["all"] = (job.finished - job.created).total_seconds()
    for stage, seconds in spans.items():
        bound = next(b for b in BOUNDS if seconds <= b)
        pipe.hincrby(SECONDS, f"{stage}|{bound}", 1)
        pipe.hincrbyfloat(SECONDS, f"{stage}|sum", seconds)


class Tally:
    """Reads what was counted."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client

    def count_resent(self) -> None:
        """A message was sent again."""
        self._redis.hincrby(COUNTS, RESENT, 1)

    def read(self) -> Counted:
        """Everything since Redis holds records."""
        counts = cast("Mapping[str, str]", self._redis.hgetall(COUNTS))
        ended: dict[tuple[str, str], int] = {}
        for name, value in counts.items():
            what, *labels = name.split("|")
            if what == ENDED:
                ended[labels[0], labels[1]] = int(value)
        seconds: dict[str, Histogram] = {}
        for name, value in cast("Mapping[str, str]", self._redis.hgetall(SECONDS)).items():
            stage, bound = name.split("|")
            histogram = seconds.setdefault(stage, Histogram())
            if bound == "sum":
                histogram.total = float(value)
            else:
                histogram.counts[float(bound)] = int(value)
        return Counted(
            accepted=int(counts.get(ACCEPTED, 0)),
            ended=ended,
            lost=int(counts.get(LOST, 0)),
            resent=int(counts.get(RESENT, 0)),
            seconds=seconds,
        )
