"""The one task: a job's files in, a mask out, and every way in which that can end."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import structlog
from celery import signals
from celery.exceptions import Reject, SoftTimeLimitExceeded
from redis import RedisError

from app.jobs.blobs import Blobs
from app.jobs.bucket import StoreAwayError
from app.jobs.bucket_store import PATIENT as PATIENT_WITH_STORE
from app.jobs.bucket_store import blobs_of
from app.jobs.cards import ModelShelf
from app.jobs.connection import PATIENT, connect
from app.jobs.logs import where
from app.jobs.queue import TASK
from app.jobs.record import Failure, Job, JobState
from app.jobs.settings import Settings
from app.jobs.store import JobOverError, JobStore, UnknownJobError
from app.jobs.traces import Traces, note
from worker.celery_app import app, settings
from worker.checkpoints import Checkpoints
from worker.gpu import tell_memory
from worker.progress import Progress
from worker.reasons import out_of_memory, reason, something_wrong, time_limit_reached
from worker.signs import SignsOfLife

if TYPE_CHECKING:
    from models.predictor import Segmentation

log = structlog.get_logger("worker")


@dataclass(frozen=True)
class Desk:
    """What a child process works with, made at its first job and kept."""

    settings: Settings
    jobs: JobStore
    signs: JobStore
    """For signs of life: what is late is worth nothing, so its connection has no patience."""
    blobs: Blobs
    checkpoints: Checkpoints
    traces: Traces = field(default_factory=lambda: Traces("passion-worker"))


@cache
def _desk() -> Desk:
    shelf = ModelShelf(settings.models, settings.default_model)
    return Desk(
        settings=settings,
        jobs=JobStore(connect(settings, PATIENT), settings),
        signs=JobStore(connect(settings), settings),
        blobs=blobs_of(settings, PATIENT_WITH_STORE),
        checkpoints=Checkpoints(shelf, settings.device, settings.overlap, settings.precision),
    )


@signals.worker_process_shutdown.connect
def _send_last_traces(**_: Any) -> None:
    if _desk.cache_info().currsize:
        _desk().traces.close()


@app.task(name=TASK, bind=True, Request="worker.request:SegmentRequest")
def segment(self: Any, job_id: str) -> None:
    """Celery's entry. May be called more than once for a job: only a job that nobody works on is worked on."""
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(job_id=job_id)
    desk, worker = _desk(), str(self.request.hostname)
    try:
        run(job_id, desk, worker)
        tell_memory(worker, desk.settings)
    except Reject:
        raise
    except Exception as error:
        # Only if telling how a job ended has failed in itself. Nobody else would ever end this job.
        desk.jobs.fail_run_of(job_id, worker, something_wrong(error))


def run(job_id: str, desk: Desk, worker: str) -> None:
    """Work on a job and write how it ended. Raises only what should end the process."""
    job = desk.jobs.begin(job_id, worker)
    if job is None:
        log.info("nothing to do")
        return
    of: dict[str, str | int] = {"attempt": job.attempts, "model": job.model, "modalities": len(job.inputs)}
    log.info("job started", **of)
    with desk.traces.span("segment", job.trace, job_id=job.id, **of):
        _attempt(job, desk)


def _attempt(job: Job, desk: Desk) -> None:
    try:
        with SignsOfLife(desk.signs, job, desk.settings.lease):
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
            _fail(job, desk, reason(error, desk.settings))
        else:
            _stop(job, desk)
    finally:
        _leave(job, desk)


def _segment(job: Job, desk: Desk) -> None:
    from worker.results import Results  # not in the parent, which needs neither numpy nor Pillow nor torch

    progress = Progress(desk.jobs, job)
    weights, predictor = desk.checkpoints.get(job.model)
    files, mask = desk.blobs.inputs(job), desk.blobs.mask(job)
    warnings: list[str] = list(job.warnings)
    results = Results(job, desk.blobs, predictor.card)

    def segmented() -> Segmentation:
        return predictor.segment(
            files,
            progress,
            preprocess=job.preprocess,
            grid=job.grid or None,
            on_volume=results.look,
            probabilities=job.probabilities,
        ).writing(job.label_values)

    try:
        segmentation = segmented()
    except Exception as error:
        if not out_of_memory(error):
            raise
        log.warning("out of memory: once more with less at a time", where=where(error))
        predictor = desk.checkpoints.leaner(predictor)
        warnings.append(
            f"The device's memory did not suffice: done in windows of {' x '.join(map(str, predictor.window))} voxels. "
            "The mask may differ a little from the usual one."
        )
        segmentation = segmented()
    warnings.extend(segmentation.warnings)
    progress.stage("saving")
    segmentation.save(mask)
    results.write(segmentation, lambda: desk.checkpoints.card_sha256(job.model))
    desk.blobs.keep(job)
    progress.stage("")
    done = desk.jobs.succeed(
        job,
        segmentation.volumes_ml,
        weights,
        seconds=progress.seconds,
        warnings=[*warnings, *results.warnings],
        origin=results.origin,
        previewed=results.previewed,
        dicom_seg=results.dicom_seg,
        probability_regions=results.probability_regions,
    )
    note(state=done.state)
    log.info("job succeeded", seconds=progress.seconds, attempts=done.attempts)


def _leave(job: Job, desk: Desk) -> None:
    """Clear away what only this run needed, unless the job is in other hands, which may share the place."""
    try:
        now = desk.jobs.get(job.id)
    except UnknownJobError:
        now = job
    except RedisError:  # then it is cleared away later
        return
    if now.state is not JobState.RUNNING or now.run == job.run:
        desk.blobs.leave(job)


def _fail(job: Job, desk: Desk, failure: Failure) -> None:
    _discard(job, desk)
    try:
        desk.jobs.fail(job, failure)
    except JobOverError:
        _stop(job, desk)
        return
    note(state=JobState.FAILED, failure=failure.kind)
    log.warning("job failed", kind=failure.kind, reference=failure.reference)


def _release(job: Job, desk: Desk) -> None:
    try:
        desk.jobs.release(job)
    except (JobOverError, RedisError):
        return
    note(state=JobState.QUEUED)
    log.info("job put back in the queue: the worker stops")


def _stop(job: Job, desk: Desk) -> None:
    """Leave a job that was cancelled, or started again elsewhere. A cancelled job's files are gone already, but for
    what was just written."""
    note(state="stopped")
    log.info("job stopped: it is no longer this run's")
    try:
        cancelled = desk.jobs.get(job.id).state is JobState.CANCELLED
    except UnknownJobError:
        cancelled = True
    with suppress(StoreAwayError):  # then it is swept later
        if cancelled:
            desk.blobs.delete(job.id)
        else:
            desk.blobs.discard_results(job)


def _discard(job: Job, desk: Desk) -> None:
    """What a run that came to nothing has written. A store that is away has it until the job's time is over."""
    with suppress(StoreAwayError):
        desk.blobs.discard_results(job)
