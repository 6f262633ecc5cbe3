"""`Presence`: which workers consume right now, which lines, and how many jobs they can run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import cast

import redis

from app.jobs.connection import clock

CONSUMING = "passion:consuming"
"""Sorted set of `<worker> <children>` by the time (seconds, Redis's clock) until which each one vouches for itself."""

SERVING = "passion:serving"
"""Hash: worker -> JSON list of the queues that it takes jobs off."""

INTERVAL = 2.0
LEASE = 10.0


@dataclass(frozen=True)
class Consumer:
    """One worker."""

    name: str
    children: int
    """Jobs it runs at the same time."""
    queues: tuple[str, ...] = ()
    """Those that it takes jobs off. None if it is of an older version, which knows nothing of lines."""


class Presence:
    """A worker renews its name from the very event loop that takes messages off the queue, so a name that is there says
    more than an answered ping: a worker whose loop hangs, or that lost the broker, is gone after `LEASE` seconds."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client

    def renew(self, worker: Consumer) -> None:
        """Say that `worker` consumes."""
        at = clock(self._redis)
        gone = cast("list[str]", self._redis.zrangebyscore(CONSUMING, 0, at - 10 * LEASE))
        with self._redis.pipeline(transaction=True) as pipe:
            if gone:
                pipe.hdel(SERVING, *(member.split(" ", 1)[0] for member in gone))
            pipe.zadd(CONSUMING, {_member(worker): at + LEASE})
            pipe.hset(SERVING, worker.name, json.dumps(worker.queues))
            pipe.zremrangebyscore(CONSUMING, 0, at - 10 * LEASE)
            pipe.execute()

    def leave(self, worker: Consumer) -> None:
        """Say that it no longer does."""
        self._redis.zrem(CONSUMING, _member(worker))
        self._redis.hdel(SERVING, worker.name)

    def workers(self) -> list[Consumer]:
        """Workers that consume."""
        members = [str(m) for m in self._redis.zrangebyscore(CONSUMING, clock(self._redis), "+inf")]
        # A worker of an older version says its name alone, while an upgrade is under way.
        parts = [m.split(" ", 1) if " " in m else (m, "1") for m in members]
        said = cast("list[str | None]", self._redis.hmget(SERVING, [name for name, _ in parts])) if parts else []
        return [
            Consumer(name, int(children), tuple(json.loads(queues or "[]")))
            for (name, children), queues in zip(parts, said, strict=True)
        ]

    def served(self) -> set[str]:
        """The queues that somebody takes jobs off."""
        return {queue for worker in self.workers() for queue in worker.queues}


def _member(worker: Consumer) -> str:
    return f"{worker.name} {worker.children}"
