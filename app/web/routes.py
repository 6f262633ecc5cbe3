"""The routes but those of jobs. Each says what happens; how is elsewhere."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path
from redis import RedisError

from app.jobs.bucket import StoreAwayError
from app.jobs.cards import CardError, ModelCard
from app.web.auth import caller
from app.web.problems import KINDS, Kind, Problem, ProblemDocument, problems_of, unavailable
from app.web.resources import Alive, Index, ModelList, ModelResource, Ready
from app.web.service import Here, Service
from app.web.version import version

router = APIRouter(dependencies=[Depends(caller)], responses=problems_of("unauthorized", "unavailable"))
"""What an API key is asked for."""
public = APIRouter()
"""What anybody may read: nothing of it is about a patient."""

STALLED = 60.0
"""Seconds in which a worker with a hand free takes a job that waits, if all is well."""


@router.get(
    "/models",
    response_model=ModelList,
    responses={
        200: {"links": {"model": {"operationId": "model", "parameters": {"name": "$response.body#/models/0/name"}}}},
        **problems_of("broken-model"),
    },
    tags=["models"],
)
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
    """Whether a job sent now would be worked on: Redis and the store answer, workers consume, there is a model. That
    jobs wait while a worker has a hand free and takes none is not readiness, however well it answers."""
    try:
        workers = service.presence.workers()
        waiting, children = service.jobs.depth(), sum(worker.children for worker in workers)
        stalled = waiting and service.jobs.live_runs() < children and _nothing_taken(service)
    except RedisError:
        raise unavailable("Redis does not answer") from None
    try:
        service.blobs.ping()
    except StoreAwayError:
        raise unavailable("the store does not answer") from None
    names = service.models.names()
    if not workers:
        raise unavailable("no worker consumes the queue")
    if stalled:
        raise unavailable("jobs wait, and workers with a hand free take none")
    if not names:
        raise unavailable("there is no model to serve")
    return Ready(workers=len(workers), children=children, waiting=waiting, models=names)


def _nothing_taken(service: Service) -> bool:
    """For long enough that a message which was lost on its way has been found missing and sent again."""
    taken = service.jobs.since_taken()
    return service.jobs.longest_waiting() > STALLED and (taken is None or taken > STALLED)


@public.get("/problems/{kind}", response_model=ProblemDocument, responses=problems_of("not-found"), tags=["problems"])
def problem(kind: Annotated[str, Path(json_schema_extra={"enum": sorted(KINDS)})]) -> ProblemDocument:
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
