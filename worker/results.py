"""`Results`: what a run gives beside its mask. None of it is worth a failed job: what fails is left out, and said."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import TypeVar

import structlog
from celery.exceptions import SoftTimeLimitExceeded
from nibabel.orientations import aff2axcodes

from app.jobs.blobs import Blobs
from app.jobs.logs import where
from app.jobs.record import Job, MaskGrid, Origin
from models.card import Card, software_versions
from models.predictor import Segmentation
from models.volume import Volume
from worker.cautions import Facts, cautions
from worker.preview import Backdrop, save_preview

T = TypeVar("T")
log = structlog.get_logger("worker")


class Results:
    """Sees the images as they are read, then writes what there is to be had of the mask."""

    def __init__(self, job: Job, blobs: Blobs, card: Card) -> None:
        self._job = job
        self._blobs = blobs
        self._card = card
        self._facts: dict[str, Facts] = {}
        self._reference = job.reference.modality
        """Whose grid the mask is on."""
        self._backdrop: Backdrop | None = None
        self.warnings: list[str] = []
        """For the reader of the mask."""
        self.origin: Origin | None = None
        self.previewed = False
        self.dicom_seg = False
        self.probability_regions: tuple[str, ...] = ()

    def look(self, modality: str, volume: Volume) -> None:
        """At an image, in the order given. Once more if the images are read once more."""
        if modality == self._reference and self._backdrop is None:
            self._backdrop = _attempted("backdrop", lambda: Backdrop.of(modality, volume))
        facts = _attempted("facts", lambda: Facts.of(volume, self._card.task))
        if facts is not None:
            self._facts[modality] = facts

    def write(self, segmentation: Segmentation, card_sha256: Callable[[], str]) -> None:
        """Once the mask is on the store."""
        job, task = self._job, segmentation.task
        said = _attempted("warnings", lambda: list(cautions(job, task, self._facts, segmentation.empty)))
        self.warnings += said or []
        if said is None or set(job.given) - self._facts.keys():
            self.warnings += _unsaid("Some warnings")
        self.origin = _attempted("report", lambda: _origin(self._card, segmentation, card_sha256()))
        if self.origin is None:
            self.warnings += _unsaid("A report")
        self.previewed = bool(_attempted("preview", lambda: self._preview(segmentation)))
        if not self.previewed:
            self.warnings += _unsaid("A preview")
        if job.reference.is_dicom and not segmentation.empty:
            self.dicom_seg = bool(_attempted("DICOM SEG", lambda: self._dicom_seg(segmentation)))
            if not self.dicom_seg:
                self.warnings += _unsaid("A DICOM SEG")
        elif job.reference.is_dicom:
            self.warnings.append("There is no DICOM SEG, since the mask is empty: the mask itself is there as NIfTI.")
        if job.probabilities:
            self.probability_regions = _attempted("probabilities", lambda: self._probabilities(segmentation)) or ()
            if not self.probability_regions:
                self.warnings += _unsaid("Probabilities")
                for place in range(len(task.regions)):
                    with suppress(OSError):
                        self._blobs.probability(job, place).unlink(missing_ok=True)

    def _preview(self, segmentation: Segmentation) -> bool:
        if self._backdrop is None:
            return False
        save_preview(self._backdrop, segmentation, self._blobs.preview(self._job))
        return True

    def _dicom_seg(self, segmentation: Segmentation) -> bool:
        from models.dicom import DicomSeries
        from models.dicom_seg import save_dicom_seg  # highdicom takes a second, and most jobs have no DICOM

        source = DicomSeries.open(self._blobs.inputs(self._job)[self._reference])
        save_dicom_seg(segmentation, source, self._card, self._blobs.dicom_seg(self._job))
        return True

    def _probabilities(self, segmentation: Segmentation) -> tuple[str, ...]:
        assert segmentation.probabilities is not None
        names = tuple(region.name for region in segmentation.task.regions)
        for place, name in enumerate(names):  # one at a time, so that one is in memory
            segmentation.probabilities.save(name, self._blobs.probability(self._job, place))
        return names


def _attempted(what: str, make: Callable[[], T]) -> T | None:
    """What `make` gives, None if it fails."""
    try:
        return make()
    except SoftTimeLimitExceeded:
        raise
    except Exception as error:
        log.warning("a result is left out", result=what, where=where(error))
        return None


def _unsaid(what: str) -> list[str]:
    return [f"{what} could not be made, which changes nothing in the mask: ask the operator, whose log says where."]


def _origin(card: Card, segmentation: Segmentation, card_sha256: str) -> Origin:
    grid, task = segmentation.grid, segmentation.task
    x, y, z = grid.zooms
    return Origin(
        software=_versions(),
        trained_with=card.software,
        card_sha256=card_sha256,
        backbone=card.backbone,
        task=task.name,
        regions={r.name: tuple(task.labels[label].value for label in r.labels) for r in task.regions},
        grid=MaskGrid(
            shape=grid.shape,
            spacing_mm=(x, y, z),
            axes="".join(aff2axcodes(grid.affine)),
            voxel_ml=grid.voxel_ml,
        ),
    )


@cache
def _versions() -> dict[str, str]:
    return software_versions()
