"""Problem documents (RFC 9457): every error a client can get, by kind."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from http import HTTPMethod, HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from redis import RedisError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from app.jobs.bucket import StoreAwayError
from app.jobs.logs import where

MEDIA_TYPE = "application/problem+json"
log = structlog.get_logger("app.web")


@dataclass(frozen=True)
class Kind:
    """A kind of problem: what stays the same each time it occurs."""

    status: HTTPStatus
    title: str


_BAD = HTTPStatus.UNPROCESSABLE_ENTITY
KINDS: dict[str, Kind] = {
    # who asks, and from where
    "unauthorized": Kind(HTTPStatus.UNAUTHORIZED, "The request has no valid API key"),
    "wrong-host": Kind(HTTPStatus.MISDIRECTED_REQUEST, "The service does not answer under this name"),
    "foreign-origin": Kind(HTTPStatus.FORBIDDEN, "A web page of another origin asked"),
    "too-slow": Kind(HTTPStatus.REQUEST_TIMEOUT, "The request took too long to arrive"),
    "busy": Kind(HTTPStatus.SERVICE_UNAVAILABLE, "The service has too much to receive just now"),
    # the request
    "not-http": Kind(HTTPStatus.BAD_REQUEST, "The request is not valid HTTP"),
    "malformed-multipart": Kind(HTTPStatus.BAD_REQUEST, "The multipart body is malformed"),
    "not-multipart": Kind(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The request is not multipart/form-data"),
    "too-large": Kind(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The upload is too large"),
    "no-images": Kind(_BAD, "No image was sent"),
    "unknown-field": Kind(_BAD, "A field is no modality of the model"),
    "duplicate-modality": Kind(_BAD, "A modality was sent twice"),
    "unknown-model": Kind(_BAD, "There is no such model"),
    "model-not-chosen": Kind(_BAD, "No model was chosen"),
    "invalid-request": Kind(_BAD, "The request is not valid"),
    # one image
    "empty-file": Kind(_BAD, "A file is empty"),
    "not-nifti": Kind(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "A file is neither NIfTI nor a zip"),
    "two-files": Kind(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "A file is half of a .hdr/.img pair"),
    "corrupt-gzip": Kind(_BAD, "A file's gzip data are damaged"),
    "truncated": Kind(_BAD, "A file ends too early"),
    "too-large-uncompressed": Kind(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "A file decompresses to too much"),
    "bad-header": Kind(_BAD, "A file's header makes no sense"),
    "bad-data-type": Kind(_BAD, "A file's voxels are of a type that is not read"),
    "bad-affine": Kind(_BAD, "A file's orientation is not usable"),
    "bad-spacing": Kind(_BAD, "A file's voxel spacing is not plausible"),
    "not-3d": Kind(_BAD, "A file is not one 3-D volume"),
    "too-many-voxels": Kind(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "A volume has too many voxels"),
    "too-few-voxels": Kind(_BAD, "A volume has too few voxels"),
    "not-finite": Kind(_BAD, "A volume has values that are not finite"),
    "empty-image": Kind(_BAD, "A volume shows nothing"),
    # one series in a zip
    "corrupt-zip": Kind(_BAD, "A file's zip is damaged, or packed as none that is read"),
    "too-many-files": Kind(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "A zip holds too many files"),
    "not-dicom": Kind(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "A zip holds something else than DICOM images"),
    "not-mr-image": Kind(_BAD, "A zip holds DICOM that is no MR image to segment"),
    "mixed-series": Kind(_BAD, "A zip holds more than one volume"),
    "bad-slices": Kind(_BAD, "A series' slices make no volume"),
    # images together
    "different-patients": Kind(_BAD, "The images are of different patients"),
    "different-field-of-view": Kind(_BAD, "The images do not show the same place"),
    # jobs
    "unknown-job": Kind(HTTPStatus.NOT_FOUND, "There is no such job"),
    "bad-idempotency-key": Kind(_BAD, "The Idempotency-Key cannot be used"),
    "idempotency-key-reused": Kind(_BAD, "The Idempotency-Key stands for another request"),
    "too-many-jobs": Kind(HTTPStatus.TOO_MANY_REQUESTS, "Too many jobs of this key wait or run"),
    "queue-full": Kind(HTTPStatus.SERVICE_UNAVAILABLE, "Too many jobs wait"),
    "too-many-streams": Kind(HTTPStatus.SERVICE_UNAVAILABLE, "Too many readers of job events"),
    "not-done": Kind(HTTPStatus.CONFLICT, "The job is not done"),
    "no-mask": Kind(HTTPStatus.GONE, "The job has no mask and will not get one"),
    "no-report": Kind(HTTPStatus.GONE, "The job has no report and will not get one"),
    "no-preview": Kind(HTTPStatus.GONE, "The job has no preview and will not get one"),
    "no-dicom-seg": Kind(HTTPStatus.GONE, "The job has no DICOM SEG and will not get one"),
    "no-probabilities": Kind(HTTPStatus.GONE, "The job has no probabilities and will not get them"),
    "unknown-region": Kind(HTTPStatus.NOT_FOUND, "The model has no such region"),
    # ours
    "not-found": Kind(HTTPStatus.NOT_FOUND, "There is nothing here"),
    "method-not-allowed": Kind(HTTPStatus.METHOD_NOT_ALLOWED, "The method is not allowed here"),
    "unavailable": Kind(HTTPStatus.SERVICE_UNAVAILABLE, "The service cannot take this now"),
    "store-full": Kind(HTTPStatus.INSUFFICIENT_STORAGE, "The store cannot take this now"),
    "broken-model": Kind(HTTPStatus.INTERNAL_SERVER_ERROR, "The model's card cannot be read"),
    "internal": Kind(HTTPStatus.INTERNAL_SERVER_ERROR, "Something went wrong on our side"),
}


class ProblemDocument(BaseModel):
    """What went wrong, for programs (`type`, `status`, `field`) and for people (`title`, `detail`, `remedy`)."""

    type: str = Field(description="Kind of the problem; a URL of this service that says what it means.")
    title: str
    status: int
    detail: str = Field(description="What is wrong this time.")
    remedy: str | None = Field(default=None, description="What to do about it.")
    field: str | None = Field(default=None, description="The form field that is at fault, as it was sent.")
    reference: str | None = Field(default=None, description="Names the entry in the log, for errors that are ours.")


_RETRY_AFTER = {
    "description": "Seconds until it is worth another try.",
    "required": True,
    "schema": {"type": "integer", "minimum": 1},
}
_HEADERS: dict[int, dict[str, Any]] = {
    HTTPStatus.UNAUTHORIZED: {
        "WWW-Authenticate": {
            "description": "What would do.",
            "required": True,
            "schema": {"type": "string", "const": "Bearer"},
        }
    },
    HTTPStatus.TOO_MANY_REQUESTS: {"Retry-After": _RETRY_AFTER},
    HTTPStatus.SERVICE_UNAVAILABLE: {"Retry-After": _RETRY_AFTER},
}
"""By status, what every problem with it brings beside the document."""


def problems_of(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for kinds of problems, by status."""
    by_status: dict[int, list[str]] = {}
    for kind in kinds:
        by_status.setdefault(int(KINDS[kind].status), []).append(kind)
    return {
        status: {
            "description": "; ".join(f"{KINDS[k].title} (`{k}`)" for k in names),
            **({"headers": _HEADERS[status]} if status in _HEADERS else {}),
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}},
        }
        for status, names in by_status.items()
    }


class Problem(Exception):  # noqa: N818 - the RFC's own word
    """Raise it anywhere below a route; the client gets the document."""

    def __init__(
        self,
        kind: str,
        detail: str,
        remedy: str | None = None,
        *,
        field: str | None = None,
        reference: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.status = KINDS[kind].status
        self.headers = headers
        self.document = ProblemDocument(
            type=f"/problems/{kind}",
            title=KINDS[kind].title,
            status=self.status,
            detail=detail,
            remedy=remedy,
            field=field,
            reference=reference,
        )

    def response(self) -> JSONResponse:
        """The document, served as RFC 9457 wants it."""
        body = self.document.model_dump(exclude_none=True)
        return JSONResponse(body, self.status, self.headers, media_type=MEDIA_TYPE)


def unavailable(what: str) -> Problem:
    """503 for a part of us that does not answer. Nothing was kept; trying again is safe."""
    return Problem(
        "unavailable",
        what,
        "Try again in a moment; what was sent with this request was not kept.",
        headers={"Retry-After": "5"},
    )


def busy(what: str) -> Problem:
    """503 for a limit on how much is received at a time; nothing was read."""
    return Problem("busy", what, "Try again in a moment.", headers={"Retry-After": "5"})


def install(app: FastAPI) -> None:
    """Make every error of the application a problem document; no other kind of error body leaves it."""

    @app.exception_handler(Problem)
    async def problem(_request: Request, error: Problem) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == HTTPStatus.NOT_FOUND:
            found = Problem("not-found", "no resource has this address", "GET /docs lists what there is.")
        elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            found = Problem(
                "method-not-allowed",
                "this address does not take the method",
                headers={"Allow": ", ".join(_methods(app, request))},
            )
        else:
            found = Problem("invalid-request", str(error.detail))
        return found.response()

    @app.exception_handler(RequestValidationError)
    async def validation(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return Problem("invalid-request", first["msg"], field=str(first["loc"][-1])).response()

    @app.exception_handler(RedisError)
    async def redis(_request: Request, error: RedisError) -> JSONResponse:
        log.error("redis does not answer", where=where(error))
        return unavailable("the job store does not answer").response()

    @app.exception_handler(StoreAwayError)
    async def store(_request: Request, _error: StoreAwayError) -> JSONResponse:
        return unavailable("the store does not answer").response()

    @app.exception_handler(Exception)
    async def unexpected(_request: Request, error: Exception) -> JSONResponse:
        reference = secrets.token_hex(6)
        log.error("unexpected error", reference=reference, where=where(error))
        return Problem(
            "internal", "an error of ours stopped this request", "Report the reference.", reference=reference
        ).response()


def _methods(app: FastAPI, request: Request) -> list[str]:
    """What the address of a request takes. Asked of all routes: the error names the methods of one of them alone."""
    scopes = {method.value: {**request.scope, "method": method.value} for method in HTTPMethod}
    return [
        method
        for method, scope in scopes.items()
        if any(route.matches(scope)[0] is Match.FULL for route in app.router.routes)
    ]
