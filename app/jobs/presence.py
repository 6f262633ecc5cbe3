"""`Presence`: which workers consume the queue right now, and how many jobs they can run."""

from __future__ import annotations

from dataclasses import dataclass

import redis

from app.jobs.connection import clock

CONSUMING = "passion:consuming"
"""Sorted set of `<worker> <children>` by the time (seconds, Redis's clock) until which each one vouches for itself."""

INTERVAL = 2.0
LEASE = 10.0


@dataclass(frozen=True)
class Consumer:
    """One worker."""

    name: str
    children: int
    """Jobs it runs at the same time."""


class Presence:
    """A worker renews its name from the very event loop that takes messages off the queue, so a name that is there says
    more than an answered ping: a worker whose loop hangs, or that lost the broker, is gone after `LEASE` seconds."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client

    def renew(self, worker: Consumer) -> None:
        """Say that `worker` consumes."""
        at = clock(self._redis)
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.zadd(CONSUMING, {_member(worker): at + LEASE})
            pipe.zremrangebyscore(CONSUMING, 0, at - 10 * LEASE)
            pipe.execute()

    def leave(self, worker: Consumer) -> None:
        """Say that it no longer does."""
        self._redis.zrem(CONSUMING, _member(worker))

    def workers(self) -> list[Consumer]:
        """Workers that consume."""
        members = [str(m) for m in self._redis.zrangebyscore(CONSUMING, clock(self._redis), "+inf")]
        # A worker of an older version says its name alone, while an upgrade is under way.
        parts = [m.split(" ", 1) if " " in m else (m, "1") for m in members]
        return [Consumer(name, int(children)) for name, children in parts]


def _member(worker: Consumer) -> str:
    return f"{worker.name} {worker.children}"
