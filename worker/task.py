"""The one task: a job's files in, a mask out, and every way in which that can end."""

from __future__ import annotations

import secrets
import sys
from dataclasses import dataclass
from functools import cache

import structlog
from celery.exceptions import Reject, SoftTimeLimitExceeded
from redis import RedisError

from app.jobs.blobs import BlobStore
from app.jobs.cards import CardError, ModelShelf
from app.jobs.connection import PATIENT, connect
from app.jobs.logs import where
from app.jobs.queue import TASK
from app.jobs.record import Failure, Job, JobState
from app.jobs.settings import Settings
from app.jobs.store import JobOverError, JobStore, UnknownJobError
from worker.celery_app import app, settings, time_limit_reached
from worker.checkpoints import Checkpoints, NoSuchModelError
from worker.progress import Progress

log = structlog.get_logger("worker")


@dataclass(frozen=True)
class Desk:
    """What a child process works with, made at its first job and kept."""

    settings: Settings
    jobs: JobStore
    blobs: BlobStore
    checkpoints: Checkpoints


@cache
def _desk() -> Desk:
    shelf = ModelShelf(settings.models, settings.default_model)
    return Desk(
        settings=settings,
        jobs=JobStore(connect(settings, PATIENT), settings),
        blobs=BlobStore(settings.store),
        checkpoints=Checkpoints(shelf, settings.device, settings.overlap, settings.precision),
    )


@app.task(name=TASK)
def segment(job_id: str) -> None:
    """Celery's entry. May be called more than once for a job: only a job that is not over is worked on."""
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(job_id=job_id)
    desk = _desk()
    try:
        run(job_id, desk)
    except Reject:
        raise
    except Exception as error:
        # Only if telling how a job ended has failed in itself. Nobody else would ever end this job.
        desk.jobs.fail_whatever_runs(job_id, _ours(error))


def run(job_id: str, desk: Desk) -> None:
    """Work on a job and write how it ended. Raises only what should end the process."""
    job = desk.jobs.begin(job_id)
    if job is None:
        log.info("nothing to do")
        return
    log.info("job started", attempt=job.attempts, model=job.model, modalities=len(job.inputs))
    try:
        _segment(job, desk)
    except JobOverError:
        _stop(job, desk)
    except SoftTimeLimitExceeded:
        _fail(job, desk, time_limit_reached(desk.settings))
    except (SystemExit, KeyboardInterrupt):
        # The worker is told to stop and its patience is over. The message goes back to the queue; so does the record.
        _release(job, desk)
        raise
    except RedisError as error:
        # Patience has run out (`PATIENT`): the record cannot be written, so the message must stay.
        log.error("redis does not answer", where=where(error))
        raise Reject("redis does not answer", requeue=True) from error
    except Exception as error:
        # A cancelled job's files vanish under its feet, which looks like an error and is none.
        if desk.jobs.owns(job):
            _fail(job, desk, _reason(error, desk))
        else:
            _stop(job, desk)


def _segment(job: Job, desk: Desk) -> None:
    progress = Progress(desk.jobs, job)
    weights, predictor = desk.checkpoints.get(job.model)
    segmentation = predictor.segment(desk.blobs.inputs(job), progress)
    segmentation.save(desk.blobs.mask(job.id))
    done = desk.jobs.succeed(job, segmentation.volumes_ml, weights)
    assert done.finished
    assert done.started
    log.info("job succeeded", seconds=round((done.finished - done.started).total_seconds(), 2))


def _reason(error: Exception, desk: Desk) -> Failure:
    """A user's reason for what the user can mend, and a reference into the log for the rest."""
    if _is(error, "models.volume", "VolumeError") or _is(error, "models.task", "TaskError"):
        return Failure(title="The images cannot be segmented", detail=str(error))
    unfit = _is(error, "models.checkpoint", "CheckpointError") or _is(error, "models.predictor", "OptionError")
    if unfit or isinstance(error, (CardError, NoSuchModelError)):
        # The operator's to mend; said without the place on this machine.
        return Failure(title="The model cannot be used", detail=str(error).replace(f"{desk.settings.models}/", ""))
    return _ours(error)


def _is(error: Exception, module: str, name: str) -> bool:
    """Whether an error is of a class of `models`, without importing that: what was never imported raised nothing."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(error, kind)


def _ours(error: Exception) -> Failure:
    reference = secrets.token_hex(6)
    log.error("unexpected error", reference=reference, where=where(error))
    return Failure(
        title="Something went wrong on our side",
        detail=f"An error of ours stopped the job. Report the reference {reference}.",
        reference=reference,
    )


def _fail(job: Job, desk: Desk, failure: Failure) -> None:
    try:
        desk.jobs.fail(job, failure)
    except JobOverError:
        _stop(job, desk)
        return
    log.warning("job failed", title=failure.title, reference=failure.reference)


def _release(job: Job, desk: Desk) -> None:
    try:
        desk.jobs.release(job)
    except (JobOverError, RedisError):
        return
    log.info("job put back in the queue: the worker stops")


def _stop(job: Job, desk: Desk) -> None:
    """Leave a job that was cancelled, or started again elsewhere. A cancelled job's files are gone already, but for
    what was just written."""
    log.info("job stopped: it is no longer this run's")
    try:
        cancelled = desk.jobs.get(job.id).state is JobState.CANCELLED
    except UnknownJobError:
        cancelled = True
    if cancelled:
        desk.blobs.delete(job.id)
