"""The routes of what a job gives: the mask, and what there is beside it. Each says what happens; how is elsewhere."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Response
from fastapi.responses import RedirectResponse
from starlette.background import BackgroundTask

from app.jobs.record import Job, JobState
from app.web.auth import caller
from app.web.job_routes import OwnJob
from app.web.problems import Problem, problems_of
from app.web.report import ProbabilityList, Report
from app.web.service import Here, Service
from app.web.upload import PROBABILITIES_FIELD
from app.web.whole_file import WholeFile

router = APIRouter(dependencies=[Depends(caller)], responses=problems_of("unauthorized", "unavailable"), tags=["jobs"])

Region = Annotated[str, Path(description="As /jobs/{job_id}/probabilities lists it.", examples=["WT"])]
NIFTI_GZ, PNG, DICOM = "application/gzip", "image/png", "application/dicom"
ELSEWHERE: dict[str, Any] = {
    "description": "Where the operator has set PASSION_LINK_SECONDS: a link to the store, good for so long, and for "
    "anybody who has it.",
    "headers": {"Location": {"description": "Its address.", "required": True, "schema": {"type": "string"}}},
}


@router.get(
    "/jobs/{job_id}/mask",
    response_class=WholeFile,
    responses={
        200: {
            "description": "A gzipped NIfTI file (uint8, or uint16 where the model's values need it; label intent) on "
            "the grid of the first image given, or of the one that `grid` names: same shape, affine, sform and qform "
            "codes, zooms. The job's `labels` name its values.",
            "content": {NIFTI_GZ: {"schema": {"type": "string", "format": "binary"}}},
        },
        307: ELSEWHERE,
        **problems_of("unknown-job", "not-done", "no-mask", "unavailable"),
    },
)
def mask(record: OwnJob, service: Here) -> Response:
    """The mask of a job that has succeeded."""
    _succeeded(record, "no-mask")
    return _file(service, service.blobs.mask(record), "no-mask", NIFTI_GZ, f"{record.id}-mask.nii.gz")


@router.get(
    "/jobs/{job_id}/report",
    response_model=Report,
    responses=problems_of("unknown-job", "not-done", "no-report", "unavailable"),
)
async def report(record: OwnJob) -> Report:
    """How the mask of a job that has succeeded came about: versions, hashes, grid, volumes, and what to be wary of."""
    _succeeded(record, "no-report")
    if record.origin is None:
        raise Problem("no-report", "none was made of this job", "Its warnings say why; send the images again.")
    return Report.of(record, record.origin)


@router.get(
    "/jobs/{job_id}/preview.png",
    response_class=WholeFile,
    responses={
        200: {
            "description": "A PNG picture: an axial, a coronal and a sagittal slice of the first image given, where "
            "most of each is labelled, with the model's regions in colours. In radiological convention, with letters. "
            "To see whether the mask is where it should be, and for nothing else.",
            "content": {PNG: {"schema": {"type": "string", "format": "binary"}}},
        },
        307: ELSEWHERE,
        **problems_of("unknown-job", "not-done", "no-preview", "unavailable"),
    },
)
def preview(record: OwnJob, service: Here) -> Response:
    """A picture of the mask of a job that has succeeded."""
    _succeeded(record, "no-preview")
    if not record.previewed:
        raise Problem("no-preview", "none was made of this job", "Its warnings say why; open the mask in a viewer.")
    return _file(service, service.blobs.preview(record), "no-preview", PNG, None)


@router.get(
    "/jobs/{job_id}/dicom-seg",
    response_class=WholeFile,
    responses={
        200: {
            "description": "The mask as a DICOM SEG object (BINARY), one segment for each label that is in it, on the "
            "slices of the DICOM series that it was made of. It names the patient and the study of that series.",
            "content": {DICOM: {"schema": {"type": "string", "format": "binary"}}},
        },
        307: ELSEWHERE,
        **problems_of("unknown-job", "not-done", "no-dicom-seg", "unavailable"),
    },
)
def dicom_seg(record: OwnJob, service: Here) -> Response:
    """The mask of a job that has succeeded as DICOM SEG, if the image on whose grid it lies was a DICOM series."""
    _succeeded(record, "no-dicom-seg")
    if not record.reference.is_dicom:
        raise Problem(
            "no-dicom-seg",
            f"the mask lies on the grid of {record.reference.modality}, which was sent as NIfTI",
            "Send that image as a zip of its DICOM series, or name one that is sent so with the field grid.",
        )
    if not record.dicom_seg:
        raise Problem("no-dicom-seg", "none was made of this job", "Its warnings say why; the mask is there as NIfTI.")
    return _file(service, service.blobs.dicom_seg(record), "no-dicom-seg", DICOM, f"{record.id}-mask.dcm")


@router.get(
    "/jobs/{job_id}/probabilities",
    response_model=ProbabilityList,
    responses={
        200: {
            "links": {
                "probability": {
                    "operationId": "probability",
                    "parameters": {"job_id": "$request.path.job_id", "region": "$response.body#/regions/0/region"},
                }
            }
        },
        **problems_of("unknown-job", "not-done", "no-probabilities", "unavailable"),
    },
)
async def probabilities(record: OwnJob) -> ProbabilityList:
    """The regions whose probabilities a job has kept, because POST /segment was sent `probabilities=true`."""
    return ProbabilityList.of(_with_probabilities(record))


@router.get(
    "/jobs/{job_id}/probabilities/{region}",
    response_class=WholeFile,
    responses={
        200: {
            "description": "A gzipped NIfTI file on the mask's own grid: uint8, from which `scl_slope` (1/255) makes "
            "probabilities from 0 to 1.",
            "content": {NIFTI_GZ: {"schema": {"type": "string", "format": "binary"}}},
        },
        307: ELSEWHERE,
        **problems_of("unknown-job", "unknown-region", "not-done", "no-probabilities", "unavailable"),
    },
)
def probability(record: OwnJob, service: Here, region: Region) -> Response:
    """How probable it is of each voxel that it belongs to a region."""
    regions = _with_probabilities(record).probability_regions
    if region not in regions:
        raise Problem("unknown-region", "the model has no such region", f"It has {', '.join(regions)}.")
    place = regions.index(region)
    path = service.blobs.probability(record, place)
    return _file(service, path, "no-probabilities", NIFTI_GZ, f"{record.id}-probability-{place}.nii.gz")


def _with_probabilities(record: Job) -> Job:
    _succeeded(record, "no-probabilities")
    if not record.probability_regions:
        if record.probabilities:
            raise Problem(
                "no-probabilities", "none could be made", "The job's warnings say why; send the images again."
            )
        raise Problem(
            "no-probabilities",
            "they were not asked for when the images were sent",
            f"Send the images again with the field {PROBABILITIES_FIELD}=true.",
        )
    return record


def _succeeded(record: Job, none: str) -> None:
    """`none`: the kind of problem of a job that will never have what is asked for."""
    if not record.state.final:
        raise Problem("not-done", f"the job is {record.state}", f"Poll /jobs/{record.id} until its state is succeeded.")
    if record.state is not JobState.SUCCEEDED:
        raise Problem(none, f"the job has {record.state}", "The job says why; send the images again if need be.")


def _file(service: Service, path: FilePath, none: str, media_type: str, name: str | None) -> Response:
    """`name`: to be saved under. A browser shows what has none."""
    try:
        seconds = service.settings.link_seconds
        link = service.blobs.link(path, seconds, media_type, name) if seconds else None
        if link is not None:
            return RedirectResponse(link, headers={"Cache-Control": "no-store"})
        reading = service.blobs.read(path)
    except FileNotFoundError:
        raise Problem(none, "the file is no longer kept", "Send the images again.") from None
    after = BackgroundTask(reading.path.unlink, missing_ok=True) if reading.temporary else None
    stat = reading.path.stat()
    return WholeFile(reading.path, media_type=media_type, filename=name, stat_result=stat, background=after)
