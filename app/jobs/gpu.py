"""`Gpus`: how much memory of their CUDA devices the workers hold, as each said after its last job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import cast

import redis

from app.jobs.connection import clock

GPUS = "passion:gpus"
"""Hash: `<worker>/<device>` to a JSON object of `DeviceMemory`'s bytes and `at`, seconds by Redis's clock."""

GOOD_FOR = 3600.0
"""Seconds after which what a worker said is no longer told: it may be gone."""


@dataclass(frozen=True)
class DeviceMemory:
    """One device of one worker, in bytes."""

    worker: str
    device: str
    reserved: int
    """Held by the worker now."""
    peak: int
    """The most it has held."""
    total: int
    """All that the device has."""


class Gpus:
    """Raises `redis.RedisError`."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client

    def write(self, memory: DeviceMemory) -> None:
        """Tell, in place of what this worker told of this device before."""
        told = asdict(memory) | {"at": clock(self._redis)}
        self._redis.hset(GPUS, f"{told.pop('worker')}/{told.pop('device')}", json.dumps(told))

    def read(self) -> list[DeviceMemory]:
        """What is not too old, by worker and device."""
        since = clock(self._redis) - GOOD_FOR
        found = []
        for name, text in sorted(cast("Mapping[str, str]", self._redis.hgetall(GPUS)).items()):
            worker, device = name.rsplit("/", 1)
            told = json.loads(text)
            if told.pop("at") >= since:
                found.append(DeviceMemory(worker, device, **told))
        return found
