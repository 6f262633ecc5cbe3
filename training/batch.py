"""`Batch`: many patients with one model. What is done is told in a report, and not done again."""

from __future__ import annotations

import csv
import fcntl
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from models.card import INTENDED_USE, Card, software_versions
from models.names import FolderError, Scans, sessions
from models.task import Task, TaskError
from models.volume import VolumeError
from training import atomic
from training.errors import UserError

if TYPE_CHECKING:
    from models.predictor import Segmentation

REPORT, TABLE = "report.json", "report.csv"
BIDS = "dataset_description.json"
"""Marks a folder in which patients are those called `sub-<label>`, and nothing else is."""

OnProgress = Callable[[str, float], None]
Segment = Callable[[Mapping[str, Path], OnProgress], "Segmentation"]


@dataclass(frozen=True)
class Patient:
    """A patient's folder, or that of one of their sessions."""

    name: str
    folder: Path


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class File(_Part):
    """A scan as it was when it was segmented."""

    path: str
    """Inside the patient's folder."""
    bytes: int
    modified_ns: int


class Row(_Part):
    """What became of one patient."""

    patient: str
    state: Literal["done", "failed"]
    modalities: list[str] = []
    missing: list[str] = []
    files: dict[str, File] = {}
    """By modality."""
    left: dict[str, str] = {}
    """Files not taken, and why."""
    mask: str | None = None
    volumes_ml: dict[str, float] = {}
    """By region."""
    warnings: list[str] = []
    error: str | None = None
    seconds: float = 0
    model: str
    weights_sha256: str


class Report(_Part):
    """What report.json holds."""

    schema_version: Literal[1] = 1
    notice: str = INTENDED_USE
    model: str
    weights_sha256: str
    settings: dict[str, Any]
    """What, besides model and scans, decides the masks."""
    labels: dict[str, str]
    """File value to name."""
    software: dict[str, str] = {}
    patients: list[Row] = []


def find_patients(root: Path) -> list[Patient]:
    """The folders in `root`, by name; of BIDS patients with sessions, these. Raises `UserError` where there is none."""
    try:
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if (root / BIDS).is_file():
            folders = [folder for folder in folders if folder.name.startswith("sub-")]
        found: dict[str, Path] = {}
        for folder in folders:
            visits = {f"{folder.name}_{visit.name}": visit for visit in sessions(folder)}
            for name, place in (visits or {folder.name: folder}).items():
                if name in found:
                    raise UserError(f"{root}: two folders would be called {name}: {found[name]} and {place}")
                found[name] = place
    except OSError as error:
        raise UserError(f"{error.filename or root}: cannot be read ({error.strerror})") from None
    if not found:
        raise UserError(f"{root}: holds no folders; --batch takes a folder with one folder for each patient")
    return [Patient(name, folder) for name, folder in found.items()]


class Batch:
    """The folder of a batch: `<patient>.nii.gz`, report.json and report.csv, each whole at any moment.

    A mask is written before its row, so one without a row, or a row without its mask, is not done.
    """

    def __init__(self, out: Path, report: Report, task: Task) -> None:
        self._out = out
        self._task = task
        self._report = report
        self._rows = {row.patient: row for row in report.patients}

    @classmethod
    @contextmanager
    def open(cls, out: Path, card: Card, settings: dict[str, Any]) -> Iterator[Batch]:
        """The batch in `out`, new or to go on with, held by this process alone. `card`'s task writes the masks.

        Raises `UserError` for a folder that cannot be written, is in use, or is of another model or other settings.
        """
        task = card.task
        labels = {str(label.value): label.name for label in task.labels if label.value}
        about = {"model": card.name, "weights_sha256": card.weights_sha256, "settings": settings, "labels": labels}
        with _held(out):
            report = Report.model_validate(about)
            if (out / REPORT).exists():
                before = _read(out / REPORT)
                other = [name for name, value in about.items() if getattr(before, name) != value]
                if other:
                    raise UserError(
                        f"{out}: holds masks made with {_said(before, other)}, not {_said(report, other)}: choose "
                        "another folder"
                    )
                report.patients = before.patients
            report.software = software_versions()
            yield cls(out, report, task)

    def start(self, patients: list[Patient]) -> None:
        """Write the report as it stands. Raises `UserError` where a mask's place is taken by something else."""
        for patient in patients:
            if not (self._out / REPORT).exists() and self._mask(patient).exists():
                raise UserError(f"{self._mask(patient)} exists, and no {REPORT}: choose another folder")
        self.save()

    def done(self, patient: Patient) -> bool:
        """Whether the patient's mask is there, made from the scans that are there now."""
        row = self._rows.get(patient.name)
        if row is None or row.state != "done" or not self._mask(patient).is_file():
            return False
        try:
            return row.files == _stamped(self._task.file_names.find(patient.folder))
        except (FolderError, OSError):
            return False

    def do(self, patient: Patient, segment: Segment, on_progress: OnProgress) -> Row:
        """Segment a patient, write the mask and then the report. What goes wrong with the patient is in the row."""
        began = time.monotonic()
        self._rows.pop(patient.name, None)
        row = Row(
            patient=patient.name,
            state="failed",
            missing=list(self._task.names),
            model=self._report.model,
            weights_sha256=self._report.weights_sha256,
        )
        try:
            self._segment(patient, segment, on_progress, row)
            row.state = "done"
        except (FolderError, TaskError, VolumeError) as error:
            row.error = str(error)
        except Exception as error:  # the next patient may be fine
            row.error = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
        row.seconds = round(time.monotonic() - began, 2)
        self._rows[patient.name] = row
        self.save()
        return row

    def _segment(self, patient: Patient, segment: Segment, on_progress: OnProgress, row: Row) -> None:
        # A mask of other scans must not stay beside a row that says `failed`.
        self._mask(patient).unlink(missing_ok=True)
        scans = self._task.file_names.find(patient.folder)
        row.files = _stamped(scans)
        row.left = {str(path.relative_to(patient.folder)): why for path, why in scans.left.items()}
        row.modalities = list(scans.files)
        row.missing = [name for name in self._task.names if name not in scans.files]
        row.warnings = scans.warnings
        segmentation = segment(scans.files, on_progress)
        if segmentation.empty:
            row.warnings.append("the mask is empty: the model found nothing in these scans")
        segmentation.save(self._mask(patient))
        row.mask = self._mask(patient).name
        row.volumes_ml = {name: round(ml, 4) for name, ml in segmentation.volumes_ml.items()}

    def _mask(self, patient: Patient) -> Path:
        return self._out / f"{patient.name}.nii.gz"

    def save(self) -> None:
        """Write the report. Raises `UserError`."""
        self._report.patients = [self._rows[name] for name in sorted(self._rows)]
        try:
            atomic.write_text(self._out / REPORT, self._report.model_dump_json(indent=1) + "\n")
            atomic.write_text(self._out / TABLE, self._table())
        except OSError as error:
            raise UserError(f"{self._out}: cannot write the report ({error.strerror})") from None

    def _table(self) -> str:
        regions = [region.name for region in self._task.regions]
        labels = "; ".join(f"{value} {name}" for value, name in self._report.labels.items())
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        volumes = [f"{region}_ml" for region in regions]
        rest = ("warnings", "error", "seconds", "mask", "labels", "model", "weights_sha256")
        table.writerow(["patient", "state", "modalities", "missing", *volumes, *rest])
        for row in self._report.patients:
            found = [row.volumes_ml.get(region, "") for region in regions]
            told = ["; ".join(row.warnings), row.error or "", row.seconds, row.mask or "", labels if row.mask else ""]
            lists = ["+".join(row.modalities), "+".join(row.missing)]
            table.writerow([row.patient, row.state, *lists, *found, *told, row.model, row.weights_sha256])
        return text.getvalue()


@contextmanager
def _held(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{out}: cannot use this folder ({error.strerror})") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another `passion predict --batch` is at work here") from None
        for pattern in (".*.tmp.nii.gz", f".{REPORT}.*", f".{TABLE}.*"):
            for partial in out.glob(pattern):  # of a run that was killed
                partial.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


def _read(path: Path) -> Report:
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError:
        raise UserError(f"{path}: no report of a batch, or a damaged one: choose another folder") from None


def _said(report: Report, names: list[str]) -> str:
    return ", ".join(f"{name} {getattr(report, name)}" for name in names)


def _stamped(scans: Scans) -> dict[str, File]:
    stamped = {}
    for name, path in scans.files.items():
        stat = path.stat()
        place = str(path.relative_to(scans.folder))
        stamped[name] = File(path=place, bytes=stat.st_size, modified_ns=stat.st_mtime_ns)
    return stamped
