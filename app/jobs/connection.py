"""How every process of ours reaches Redis."""

from __future__ import annotations

from typing import Any, cast
from urllib.parse import unquote, urlsplit

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from app.jobs.settings import Settings

SENTINEL = "sentinel://"

ONCE_MORE = Retry(ExponentialBackoff(cap=0.2, base=0.05), 1)
"""For requests: carries a call over a connection that Redis closed while it idled, and else gives up soon."""

PATIENT = Retry(ExponentialBackoff(cap=5.0, base=0.1), 60)
"""For a worker: minutes of work are not thrown away because Redis is being restarted. About five minutes."""


def connect(settings: Settings, retry: Retry = ONCE_MORE) -> redis.Redis:
    """A client with a bounded wait per attempt. With Sentinels it follows the master: after a failover the next
    connection is to the new one."""
    options: dict[str, Any] = {
        "decode_responses": True,
        "socket_connect_timeout": settings.redis_timeout,
        "socket_timeout": settings.redis_timeout,
        "retry": retry,
        "health_check_interval": 30,
    }
    if not settings.redis_url.startswith(SENTINEL):
        return redis.Redis.from_url(settings.redis_url, **options)
    parts = [urlsplit(address) for address in settings.redis_url.split(";")]
    # As Celery reads such an address, too: user, password and database of the Redis behind stand in it once.
    account = next((part for part in parts if part.password), parts[0])
    sentinels = Sentinel(
        [(part.hostname or "127.0.0.1", part.port or 26379) for part in parts],
        sentinel_kwargs={"socket_connect_timeout": settings.redis_timeout, "socket_timeout": settings.redis_timeout},
    )
    return cast(
        redis.Redis,
        sentinels.master_for(
            settings.redis_master,
            username=unquote(account.username) if account.username else None,
            password=unquote(account.password) if account.password else None,
            db=int(parts[-1].path.strip("/") or 0),
            **options,
        ),
    )


def clock(client: redis.Redis) -> float:
    """The time by Redis, in seconds: machines that share one need not agree on the time with each other."""
    seconds, microseconds = client.time()
    return seconds + microseconds / 1e6
