"""The routes of jobs: send, look, delete. Each says what happens; how is elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Annotated

import anyio
import structlog
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.sse import EventSourceResponse
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema
from redis import RedisError

from app.jobs.admission import KeyReusedError, QueueFullError, TooManyJobsError
from app.jobs.lines import Needs, Priority
from app.jobs.queue import QueueError
from app.jobs.record import Job, JobState, LabelName, new_id
from app.jobs.store import JobOverError, UnknownJobError
from app.jobs.traces import note, traceparent
from app.web.auth import Caller, caller
from app.web.events import events_of, stream_slot
from app.web.patience import one_upload
from app.web.problems import Problem, problems_of, unavailable
from app.web.resources import EXAMPLE_JOB, JobList, JobResource
from app.web.service import Here, Service
from app.web.standing import Standing
from app.web.upload import Accepted, receive
from app.web.watch import watched

router = APIRouter(dependencies=[Depends(caller)], responses=problems_of("unauthorized", "unavailable"), tags=["jobs"])
log = structlog.get_logger("app.web")

JobId = Annotated[str, Path(description="As POST /segment answered it.", examples=[EXAMPLE_JOB["id"]])]
IdempotencyKey = Annotated[
    str | SkipJsonSchema[None],
    Header(
        description="Names this request, 1 to 255 printable ASCII characters. The same request with the same key gives "
        "the same job and no second one; another request with it is refused. Good until the job is removed.",
        # For the document alone; `_digest` is what refuses. Spaces at either end belong to HTTP, not to the value.
        json_schema_extra={"minLength": 1, "maxLength": 255, "pattern": "^[!-~]([ -~]*[!-~])?$"},
    ),
]

_UPLOAD_PROBLEMS = [
    *("malformed-multipart", "not-multipart", "too-large", "no-images", "unknown-field", "duplicate-modality"),
    *(
        "invalid-request",
        "unknown-model",
        "model-not-chosen",
        "empty-file",
        "not-nifti",
        "two-files",
        "corrupt-gzip",
        "truncated",
    ),
    *("too-large-uncompressed", "bad-header", "bad-data-type", "bad-affine", "bad-spacing", "not-3d"),
    *("corrupt-zip", "too-many-files", "not-dicom", "not-mr-image", "mixed-series", "bad-slices", "different-patients"),
    *("too-many-voxels", "too-few-voxels", "not-finite", "empty-image", "different-field-of-view", "store-full"),
    *("bad-idempotency-key", "idempotency-key-reused", "too-many-jobs", "queue-full", "unavailable", "broken-model"),
    *("too-slow", "invalid-request"),
]


@router.post(
    "/segment",
    status_code=202,
    response_model=JobResource,
    dependencies=[Depends(watched), Depends(one_upload)],
    responses={
        202: {
            "description": "Accepted: poll the job until its state is final.",
            "headers": {"Location": {"description": "Its address.", "required": True, "schema": {"type": "string"}}},
            "links": {
                name: {"operationId": name, "parameters": {"job_id": "$response.body#/id"}}
                for name in ("job", "events", "mask", "report", "preview", "dicom_seg", "probabilities", "cancel")
            },
        },
        **problems_of(*_UPLOAD_PROBLEMS),
    },
)
async def segment(
    request: Request, response: Response, service: Here, caller: Caller, idempotency_key: IdempotencyKey = None
) -> JobResource:
    """Send the images of one patient, any non-empty subset of the model's modalities, and get a job."""
    idempotency = _digest(idempotency_key)
    await run_sync(_room, service, "" if idempotency else caller, bool(idempotency))  # better now than after the upload
    in_batch = await run_sync(service.keys.is_batch, caller)
    job_id = new_id()
    structlog.contextvars.bind_contextvars(job_id=job_id)
    log.info("upload begins")
    try:
        folder = await run_sync(service.blobs.incoming, job_id, limiter=service.writing)
        accepted = await receive(request, service, folder)
    except BaseException:
        with anyio.CancelScope(shield=True):  # the sender may have hung up: nothing stays all the same
            await run_sync(service.blobs.refuse, job_id, limiter=service.writing)
        raise
    priority = "batch" if in_batch else accepted.priority
    needs = service.settings.needs_of(accepted.model)
    job = await run_sync(_enqueue, service, _job(job_id, accepted, caller, idempotency, needs, priority))
    note(job_id=job.id, model=job.model, modalities=len(job.inputs), state=job.state)
    log.info("job accepted", job_id=job.id, model=job.model, modalities=len(job.inputs), repeated=job.id != job_id)
    response.headers["Location"] = f"/jobs/{job.id}"
    return JobResource.of(job, await run_sync(Standing.of, job, service))


def _digest(idempotency_key: str | None) -> str:
    """What is kept of a key: senders put all sorts of things into them."""
    if idempotency_key is None:
        return ""
    if not (1 <= len(idempotency_key) <= 255 and idempotency_key.isascii() and idempotency_key.isprintable()):
        raise Problem(
            "bad-idempotency-key",
            "the header Idempotency-Key must have 1 to 255 printable ASCII characters",
            "Use a UUID of your own per request.",
            field="Idempotency-Key",
        )
    return hashlib.sha256(idempotency_key.encode()).hexdigest()


def _room(service: Service, caller: str, repeated: bool) -> None:
    """Turn an upload away before it is sent. One with an Idempotency-Key may be a job that is there already, so only
    what it has sent tells."""
    if repeated:
        service.jobs.ping()
        return
    try:
        service.jobs.room(caller)
    except (QueueFullError, TooManyJobsError) as error:
        raise _no_room(error, service) from None


def _no_room(error: Exception, service: Service) -> Problem:
    if isinstance(error, TooManyJobsError):
        return Problem(
            "too-many-jobs",
            f"{service.settings.jobs_per_key} jobs of this key wait or run, which is as many as may",
            "Wait until one is done, or delete one. What was sent with this request was not kept.",
            headers={"Retry-After": "10"},
        )
    return Problem(
        "queue-full",
        f"{service.settings.queue_limit} jobs wait, which is as many as may",
        "Try again later. What was sent with this request was not kept.",
        headers={"Retry-After": "30"},
    )


def _job(job_id: str, accepted: Accepted, owner: str, idempotency: str, needs: Needs, priority: Priority) -> Job:
    card = accepted.card
    given = tuple(item.modality for item in accepted.inputs)
    return Job(
        id=job_id,
        model=accepted.model,
        weights_sha256=card.weights_sha256,
        inputs=accepted.inputs,
        preprocess=accepted.preprocess,
        grid=accepted.grid,
        needs=needs,
        priority=priority,
        missing=tuple(name for name in card.modalities if name not in given),
        labels=tuple(
            LabelName(value=accepted.label_values.get(label.name, label.value), name=label.name)
            for label in card.task.labels
        ),
        label_values=accepted.label_values,
        expected=card.expectation(given),
        probabilities=accepted.probabilities,
        warnings=accepted.warnings,
        owner=owner,
        fingerprint=accepted.fingerprint,
        idempotency=idempotency,
        trace=traceparent(),
    )


def _enqueue(service: Service, job: Job) -> Job:
    """Files, then record, then message: whoever finds one of them finds those before it. Killed in between, the files
    are swept up, or the message is found missing and sent. Gives back the job that the request stands for; unless that
    is `job`, nothing of `job` stays."""
    created = None
    try:
        service.blobs.accept(job.id)
        created = _create(service, job)
        return created
    finally:
        if created is None or created.id != job.id:
            service.blobs.delete(job.id)


def _create(service: Service, job: Job) -> Job:
    try:
        created = service.jobs.create(job)
        if created.id == job.id:
            service.queue.submit(job)
    except (QueueFullError, TooManyJobsError) as error:
        raise _no_room(error, service) from None
    except KeyReusedError:
        raise Problem(
            "idempotency-key-reused",
            "the Idempotency-Key was sent before, with other images, another order, another model or other options",
            "Use a new key for a new request.",
            field="Idempotency-Key",
        ) from None
    except UnknownJobError:
        raise unavailable("the job of this Idempotency-Key was removed just now") from None
    except (QueueError, RedisError) as error:
        _take_back(service, job)
        raise unavailable("the queue does not take jobs") from error
    except BaseException:
        _take_back(service, job)
        raise
    return created


def _take_back(service: Service, job: Job) -> None:
    try:
        service.jobs.remove(job.id)
    except RedisError:
        log.error("a record may be left behind", job_id=job.id)


@router.get("/jobs", response_model=JobList, responses=problems_of("invalid-request", "unavailable"))
def jobs(
    service: Here,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=200, description="Jobs on one page.")] = 50,
    before: Annotated[
        Annotated[int, Field(ge=0, le=2**53)] | SkipJsonSchema[None],
        Query(description="Where to go on from: as the page before had it in `next`."),
    ] = None,
) -> JobList:
    """The caller's own jobs, the latest first."""
    found, rest = service.jobs.of_owner(caller, before, limit)
    resources = [JobResource.of(job, Standing.of(job, service)) for job in found]
    return JobList(jobs=resources, next=None if rest is None else f"/jobs?limit={limit}&before={rest}")


async def own_job(job_id: JobId, service: Here, caller: Caller) -> Job:
    """The record of a job of the caller's; another's is as unknown as one that never was."""
    return await run_sync(_own_job, job_id, service, caller)


def _own_job(job_id: str, service: Service, caller: str) -> Job:
    try:
        record = service.jobs.get(job_id)
    except UnknownJobError:
        raise _unknown_job() from None
    if record.owner != caller:
        raise _unknown_job()
    return record


OwnJob = Annotated[Job, Depends(own_job)]


def _unknown_job() -> Problem:
    return Problem("unknown-job", "no job has this id", "Ids come from POST /segment; removed jobs are forgotten.")


@router.get("/jobs/{job_id}", response_model=JobResource, responses=problems_of("unknown-job", "unavailable"))
async def job(record: OwnJob, service: Here) -> JobResource:
    """How a job is doing."""
    # Every way into a thread and back waits for Python's lock twice, which uploads keep busy: none for nothing.
    waits = record.state is JobState.QUEUED
    return JobResource.of(record, await run_sync(Standing.of, record, service) if waits else Standing())


@router.get(
    "/jobs/{job_id}/events",
    response_class=EventSourceResponse,
    responses=problems_of("unknown-job", "too-many-streams", "unavailable"),
    dependencies=[Depends(stream_slot)],
)
async def events(record: OwnJob, service: Here) -> AsyncIterator[JobResource]:
    """The job as `GET /jobs/{id}` has it, now and each time it changes, until it is over (server-sent events)."""
    async for resource in events_of(record, service):
        yield resource


@router.delete(
    "/jobs/{job_id}",
    status_code=204,
    response_class=Response,
    responses=problems_of("unknown-job", "unavailable"),
)
def cancel(record: OwnJob, service: Here) -> None:
    """Stop a job that is not over, and remove its files at once. The record of a stopped job stays readable for a while
    (`cancelled`); that of a finished one is removed."""
    try:
        service.jobs.cancel(record.id)
        service.blobs.delete(record.id)
    except JobOverError:
        service.blobs.delete(record.id)
        if _own_job(record.id, service, record.owner).state is not JobState.CANCELLED:
            service.jobs.remove(record.id)
    except UnknownJobError:
        raise _unknown_job() from None
    log.info("job deleted", job_id=record.id)
