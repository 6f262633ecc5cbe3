"""The routes. Each says what happens; how is elsewhere."""

from __future__ import annotations

from typing import Annotated, Any

import anyio
import structlog
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.responses import FileResponse
from redis import RedisError

from app.jobs.cards import CardError, ModelCard
from app.jobs.queue import QueueError
from app.jobs.record import Job, JobState, LabelName, new_id
from app.jobs.store import JobOverError, UnknownJobError
from app.web.auth import caller
from app.web.patience import one_upload
from app.web.problems import KINDS, MEDIA_TYPE, Kind, Problem, ProblemDocument, unavailable
from app.web.resources import Alive, Index, JobResource, ModelList, ModelResource, Ready
from app.web.service import Here, Service
from app.web.upload import Accepted, receive
from app.web.version import version

log = structlog.get_logger("app.web")

JobId = Annotated[str, Path(description="As POST /segment answered it.")]
NIFTI_GZ = "application/gzip"


def problems_of(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for kinds of problems, by status."""
    by_status: dict[int, list[str]] = {}
    for kind in kinds:
        by_status.setdefault(int(KINDS[kind].status), []).append(kind)
    return {
        status: {
            "description": "; ".join(f"{KINDS[k].title} (`{k}`)" for k in names),
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}},
        }
        for status, names in by_status.items()
    }


router = APIRouter(dependencies=[Depends(caller)], responses=problems_of("unauthorized"))
"""What an API key is asked for."""
public = APIRouter()
"""What anybody may read: nothing of it is about a patient."""

_UPLOAD_PROBLEMS = [
    *("malformed-multipart", "not-multipart", "too-large", "no-images", "unknown-field", "duplicate-modality"),
    *("unknown-model", "model-not-chosen", "empty-file", "not-nifti", "two-files", "corrupt-gzip", "truncated"),
    *(
        "too-large-uncompressed",
        "bad-header",
        "bad-data-type",
        "bad-affine",
        "bad-spacing",
        "not-3d",
        "too-many-voxels",
    ),
    *("too-few-voxels", "not-finite", "empty-image", "different-field-of-view", "store-full", "unavailable"),
    *("broken-model", "foreign-origin", "too-slow", "busy"),
]


@router.post(
    "/segment",
    status_code=202,
    response_model=JobResource,
    responses={
        202: {
            "description": "Accepted: poll the job until its state is final.",
            "headers": {"Location": {"description": "The job's address.", "schema": {"type": "string"}}},
        },
        **problems_of(*_UPLOAD_PROBLEMS),
    },
    dependencies=[Depends(one_upload)],
    tags=["jobs"],
)
async def segment(request: Request, response: Response, service: Here) -> JobResource:
    """Send the images of one patient, any non-empty subset of the model's modalities, and get a job."""
    await run_sync(service.jobs.ping)  # better now than after the upload
    job_id = new_id()
    structlog.contextvars.bind_contextvars(job_id=job_id)
    try:
        folder = await run_sync(service.blobs.incoming, job_id, limiter=service.writing)
        accepted = await receive(request, service, folder)
        job = _job(job_id, accepted)
        await run_sync(_enqueue, service, job)
    except BaseException:
        with anyio.CancelScope(shield=True):  # the sender may have hung up: nothing stays all the same
            await run_sync(service.blobs.delete, job_id, limiter=service.writing)
        raise
    log.info("job accepted", model=job.model, modalities=len(job.inputs))
    response.headers["Location"] = f"/jobs/{job.id}"
    return JobResource.of(job, await run_sync(service.jobs.position, job.id))


def _job(job_id: str, accepted: Accepted) -> Job:
    card = accepted.card
    given = tuple(item.modality for item in accepted.inputs)
    return Job(
        id=job_id,
        model=accepted.model,
        weights_sha256=card.weights_sha256,
        inputs=accepted.inputs,
        missing=tuple(name for name in card.modalities if name not in given),
        labels=tuple(LabelName(value=label.value, name=label.name) for label in card.task.labels),
        expected=card.expectation(given),
    )


def _enqueue(service: Service, job: Job) -> None:
    """Files, then record, then message: whoever finds one of them finds those before it."""
    service.blobs.accept(job.id)
    try:
        service.jobs.create(job)
        service.queue.submit(job.id)
    except (QueueError, RedisError) as error:
        try:
            service.jobs.remove(job.id)
        except RedisError:
            log.error("a record may be left behind", job_id=job.id)
        raise unavailable("the queue does not take jobs") from error


@router.get(
    "/jobs/{job_id}",
    response_model=JobResource,
    responses=problems_of("unknown-job", "unavailable"),
    tags=["jobs"],
)
def job(job_id: JobId, service: Here) -> JobResource:
    """How a job is doing."""
    record = _record(service, job_id)
    return JobResource.of(record, service.jobs.position(job_id) if record.state is JobState.QUEUED else None)


@router.get(
    "/jobs/{job_id}/mask",
    response_class=FileResponse,
    responses={
        200: {
            "description": "A gzipped NIfTI file (uint8, or uint16 where the model's values need it; label intent) on "
            "the grid of the first image given: same shape, affine, sform and qform codes, zooms. The job's `labels` "
            "name its values.",
            "content": {NIFTI_GZ: {"schema": {"type": "string", "format": "binary"}}},
        },
        **problems_of("unknown-job", "not-done", "no-mask", "unavailable"),
    },
    tags=["jobs"],
)
def mask(job_id: JobId, service: Here) -> FileResponse:
    """The mask of a job that has succeeded."""
    record = _record(service, job_id)
    if not record.state.final:
        raise Problem("not-done", f"the job is {record.state}", f"Poll /jobs/{record.id} until its state is succeeded.")
    if record.state is not JobState.SUCCEEDED:
        raise Problem("no-mask", f"the job has {record.state}", "The job says why; send the images again if need be.")
    path = service.blobs.mask(record.id)
    try:
        stat = path.stat()
    except FileNotFoundError:
        raise Problem("no-mask", "the mask is no longer kept", "Send the images again.") from None
    return FileResponse(path, media_type=NIFTI_GZ, filename=f"{record.id}-mask.nii.gz", stat_result=stat)


@router.delete(
    "/jobs/{job_id}",
    status_code=204,
    response_class=Response,
    responses=problems_of("unknown-job", "unavailable"),
    tags=["jobs"],
)
def cancel(job_id: JobId, service: Here) -> None:
    """Stop a job that is not over, and remove its files at once. The record of a stopped job stays readable for a while
    (`cancelled`); that of a finished one is removed."""
    try:
        service.jobs.cancel(job_id)
        service.blobs.delete(job_id)
    except JobOverError:
        service.blobs.delete(job_id)
        if _record(service, job_id).state is not JobState.CANCELLED:
            service.jobs.remove(job_id)
    except UnknownJobError:
        raise _unknown_job() from None
    log.info("job deleted", job_id=job_id)


def _record(service: Service, job_id: str) -> Job:
    try:
        return service.jobs.get(job_id)
    except UnknownJobError:
        raise _unknown_job() from None


def _unknown_job() -> Problem:
    return Problem("unknown-job", "no job has this id", "Ids come from POST /segment; removed jobs are forgotten.")


@router.get("/models", response_model=ModelList, responses=problems_of("broken-model"), tags=["models"])
def models(service: Here) -> ModelList:
    """The models that can be chosen, their modalities, and how well each subset of them has done."""
    default = service.models.default()
    found = ((name, _card(service, name)) for name in service.models.names())
    return ModelList(models=[ModelResource.of(n, card, n == default) for n, card in found if card is not None])


@router.get(
    "/models/{name}",
    response_model=ModelResource,
    responses=problems_of("not-found", "broken-model"),
    tags=["models"],
)
def model(name: str, service: Here) -> ModelResource:
    """One model."""
    card = _card(service, name)
    if card is None:
        raise Problem("not-found", "there is no such model", "GET /models lists them.")
    return ModelResource.of(name, card, name == service.models.default())


def _card(service: Service, name: str) -> ModelCard | None:
    try:
        return service.models.get(name)
    except CardError as error:
        raise Problem("broken-model", str(error), "The operator must mend the model's card.") from error


@public.get("/livez", response_model=Alive, tags=["health"])
def livez() -> Alive:
    """Whether this process answers. Asks nobody else: restarting it would not bring Redis back."""
    return Alive()


@public.get("/readyz", response_model=Ready, responses=problems_of("unavailable"), tags=["health"])
def readyz(service: Here) -> Ready:
    """Whether a job sent now would be worked on: Redis answers, a worker consumes the queue, there is a model."""
    try:
        workers = service.presence.count()
    except RedisError:
        raise unavailable("Redis does not answer") from None
    names = service.models.names()
    if not workers:
        raise unavailable("no worker consumes the queue")
    if not names:
        raise unavailable("there is no model to serve")
    return Ready(workers=workers, models=names)


@public.get("/problems/{kind}", response_model=ProblemDocument, responses=problems_of("not-found"), tags=["problems"])
def problem(kind: str) -> ProblemDocument:
    """What a kind of problem means: the `type` of a problem document points here."""
    known: Kind | None = KINDS.get(kind)
    if known is None:
        raise Problem("not-found", "there is no such kind of problem", f"Kinds: {', '.join(sorted(KINDS))}.")
    return ProblemDocument(type=f"/problems/{kind}", title=known.title, status=known.status, detail=known.title)


@public.get("/", response_model=Index, include_in_schema=False)
def index() -> Index:
    """Where things are."""
    links = {
        "segment": "/segment",
        "models": "/models",
        "docs": "/docs",
        "openapi": "/openapi.json",
        "ready": "/readyz",
    }
    return Index(version=version(), links=links)
