"""`Presence`: which workers consume the queue right now."""

from __future__ import annotations

import time

import redis

CONSUMING = "passion:consuming"
"""Sorted set of worker names by the time (Unix seconds) until which each one vouches for itself."""

INTERVAL = 2.0
LEASE = 10.0


class Presence:
    """A worker renews its name from the very event loop that takes messages off the queue, so a name that is there says
    more than an answered ping: a worker whose loop hangs, or that lost the broker, is gone after `LEASE` seconds."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client

    def renew(self, worker: str) -> None:
        """Say that `worker` consumes."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.zadd(CONSUMING, {worker: time.time() + LEASE})
            pipe.zremrangebyscore(CONSUMING, 0, time.time() - 10 * LEASE)
            pipe.execute()

    def leave(self, worker: str) -> None:
        """Say that it no longer does."""
        self._redis.zrem(CONSUMING, worker)

    def count(self) -> int:
        """Workers that consume."""
        return self._redis.zcount(CONSUMING, time.time(), "+inf")
