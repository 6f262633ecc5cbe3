"""DICOM on the command line of `passion predict`: series as scans, and the mask as DICOM SEG."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import UserError

if TYPE_CHECKING:
    from models.card import Card
    from models.dicom import DicomSeries
    from models.predictor import Segmentation
    from models.task import Task


@dataclass(frozen=True)
class SegFile:
    """The DICOM SEG that somebody has asked for."""

    path: Path
    source: DicomSeries

    @classmethod
    def planned(cls, path: Path | None, files: Mapping[str, Path], task: Task, grid: str | None) -> SegFile | None:
        """Looked at before anything is computed; None if none is asked for. Raises `UserError` and `VolumeError`, also
        for series of different patients."""
        series = _series(files, task)
        if path is None:
            return None
        source = series.get(task.canonical(next(iter(files)) if grid is None else grid))
        if source is None:
            raise UserError("--dicom-seg: the scan on whose grid the mask lies is no DICOM series")
        return cls(path, source)

    def save(self, segmentation: Segmentation, card: Card) -> tuple[str, ...]:
        """Write it; why not, if it cannot be had."""
        from models.dicom_seg import NoSegError, save_dicom_seg

        try:
            save_dicom_seg(segmentation, self.source, card, self.path)
        except NoSegError as error:
            return (f"no DICOM SEG: {error}",)
        return ()


def check_seg_path(path: Path | None, batch: bool) -> None:
    """Raises `UserError` for a place where no DICOM SEG can be written."""
    if path is None:
        return
    if batch:
        raise UserError("--dicom-seg: cannot be had with --batch")
    if path.suffix.lower() != ".dcm":
        raise UserError(f"{path}: end the name of the DICOM SEG in .dcm")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder: make it first")


def _series(files: Mapping[str, Path], task: Task) -> dict[str, DicomSeries]:
    from models.dicom import DicomSeries, is_series
    from models.volume import VolumeError

    found: dict[str, DicomSeries] = {}
    for given, path in files.items():
        if is_series(path):
            name = task.canonical(given)
            try:
                found[name] = DicomSeries.open(path)
            except VolumeError as error:
                raise VolumeError(f"{name}: {error}") from None
    patients = {one.series.patient for one in found.values() if one.series.patient}
    if len(patients) > 1:
        raise UserError(f"the DICOM series of {', '.join(found)} are of {len(patients)} patients: give scans of one")
    return found
