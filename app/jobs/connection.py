"""How every process of ours reaches Redis."""

from __future__ import annotations

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from app.jobs.settings import Settings

ONCE_MORE = Retry(ExponentialBackoff(cap=0.2, base=0.05), 1)
"""For requests: carries a call over a connection that Redis closed while it idled, and else gives up soon."""

PATIENT = Retry(ExponentialBackoff(cap=5.0, base=0.1), 60)
"""For a worker: minutes of work are not thrown away because Redis is being restarted. About five minutes."""


def connect(settings: Settings, retry: Retry = ONCE_MORE) -> redis.Redis:
    """A client with a bounded wait per attempt."""
    return redis.Redis.from_url(
        settings.redis_url,
        decode_responses=True,
        socket_connect_timeout=settings.redis_timeout,
        socket_timeout=settings.redis_timeout,
        retry=retry,
        health_check_interval=30,
    )


def clock(client: redis.Redis) -> float:
    """The time by Redis, in seconds: machines that share one need not agree on the time with each other."""
    seconds, microseconds = client.time()
    return seconds + microseconds / 1e6
