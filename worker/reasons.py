"""Why a job has failed: a user's reason for what the user can mend, an operator's for the rest, or a reference into the
log."""

from __future__ import annotations

import errno
import secrets
import sys

import structlog

from app.jobs.bucket import StoreAwayError
from app.jobs.cards import CardError
from app.jobs.logs import where
from app.jobs.record import Failure
from app.jobs.settings import Settings
from worker.checkpoints import NoSuchModelError

log = structlog.get_logger("worker")


def reason(error: Exception, settings: Settings) -> Failure:
    """What an error means to the sender of the job."""
    if _is(error, "models.volume", "VolumeError") or _is(error, "models.task", "TaskError"):
        return Failure(kind="images", title="The images cannot be segmented", detail=str(error))
    unfit = _is(error, "models.checkpoint", "CheckpointError") or _is(error, "models.predictor", "OptionError")
    if unfit or isinstance(error, (CardError, NoSuchModelError)):
        # The operator's to mend; said without the place on this machine.
        detail = str(error).replace(f"{settings.models}/", "")
        return Failure(kind="model", title="The model cannot be used", detail=detail)
    if out_of_memory(error):
        return Failure(
            kind="out-of-memory",
            title="The worker's memory does not suffice",
            detail="The images do not fit into the device's memory, not even in smaller windows. Crop or resample "
            "them, or ask the operator for a device with more memory that is free.",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failure(
            kind="store-full",
            title="The store is full",
            detail="There was no room for the mask. Send the images again later; the operator must make room on the "
            "store.",
        )
    if isinstance(error, StoreAwayError):
        return Failure(
            kind="store-away",
            title="The store is away",
            detail="The images could not be fetched from the store, or the mask not be brought there. Send the images "
            "again later; the operator must look after the store.",
        )
    return something_wrong(error)


def something_wrong(error: Exception) -> Failure:
    """An error of ours: its story goes into the log, and a reference to that to the sender."""
    reference = secrets.token_hex(6)
    log.error("unexpected error", reference=reference, where=where(error))
    return Failure(
        title="Something went wrong on our side",
        detail=f"An error of ours stopped the job. Report the reference {reference}.",
        reference=reference,
    )


def time_limit_reached(settings: Settings) -> Failure:
    """Why a job that took too long has failed."""
    return Failure(
        kind="time-limit",
        title="The time limit was reached",
        detail=f"The job ran for more than {settings.soft_time_limit:g} s. Crop or resample the volumes, or ask the "
        "operator for a faster worker or a higher PASSION_SOFT_TIME_LIMIT.",
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the machine, had no memory left. Torch says so of a CPU in a plain RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or _is(error, "torch", "OutOfMemoryError")
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


def _is(error: BaseException, module: str, name: str) -> bool:
    """Whether an error is of a class of `models` or torch, without importing that: what was never imported raised
    nothing."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(error, kind)
