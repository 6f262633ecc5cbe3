"""`tell_memory`: how much of its CUDA device this child holds, for those who watch."""

from __future__ import annotations

from functools import cache

import structlog
from redis import RedisError

from app.jobs.connection import connect
from app.jobs.gpu import DeviceMemory, Gpus
from app.jobs.settings import Settings
from worker.checkpoints import pick_device

log = structlog.get_logger("worker")


@cache
def _gpus(settings: Settings) -> Gpus:
    return Gpus(connect(settings))


def tell_memory(worker: str, settings: Settings) -> None:
    """After a job. On a CPU there is nothing to tell."""
    device = pick_device(settings.device)
    if device == "cpu":
        return
    try:
        _gpus(settings).write(_memory(worker, device))
    except RedisError:
        log.warning("redis does not answer: the device's memory is not told")


def _memory(worker: str, device: str) -> DeviceMemory:
    from torch import cuda

    reserved, peak = cuda.memory_reserved(device), cuda.max_memory_reserved(device)
    return DeviceMemory(worker, device, reserved, peak, cuda.get_device_properties(device).total_memory)
