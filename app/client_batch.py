"""`Batch`: many patients through a service, some at a time. What is done is told in a report, and not done again."""

from __future__ import annotations

import csv
import fcntl
import io
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from app.client import Client, ClientError, Patience
from app.client_names import Result
from app.client_results import save
from app.names import FileNames, FolderError, Scans, sessions

REPORT, TABLE = "report.json", "report.csv"
BIDS = "dataset_description.json"
"""Marks a folder in which patients are those called `sub-<label>`, and nothing else is."""
AWAY = 300.0
"""Seconds after which a service that does not answer ends the batch; a full one is waited for."""
GONE = (404, 410)

Say = Callable[[str], None]


class BatchError(RuntimeError):
    """The batch cannot begin, or not go on. The message says why, in one line."""


class StoppedError(Exception):
    """Somebody asked the batch to stop."""


@dataclass(frozen=True)
class Patient:
    """A patient's folder, or that of one of their sessions."""

    name: str
    folder: Path


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class File(_Part):
    """A scan as it was when it was sent."""

    path: str
    """Inside the patient's folder."""
    bytes: int
    modified_ns: int


class Row(_Part):
    """What became of one patient."""

    patient: str
    state: Literal["sent", "done", "failed"]
    """`sent`: on its way, or left at the service when the batch was stopped."""
    request: str
    """The request's Idempotency-Key: known before it is sent, so that no job is made twice."""
    job: str | None = None
    """Its address at the service, once that has taken it."""
    files: dict[str, File] = {}
    """By modality."""
    left: dict[str, str] = {}
    """Files not taken, and why."""
    missing: list[str] = []
    results: list[str] = []
    """Names of the files in the report's folder, the mask's first."""
    volumes_ml: dict[str, float] = {}
    """By region."""
    labels: dict[str, str] = {}
    """Value in the mask to name."""
    warnings: list[str] = []
    error: str | None = None
    seconds: float = 0
    model: str = ""
    weights_sha256: str = ""


class Report(_Part):
    """What report.json holds."""

    schema_version: Literal[1] = 1
    notice: str = "Research software, not a medical device."
    url: str
    form: dict[str, str]
    """What the service was asked for with every patient."""
    save: list[Result]
    patients: list[Row] = []


def find_patients(root: Path) -> list[Patient]:
    """The folders in `root`, by name; of BIDS patients with sessions, these. Raises `BatchError` where there is none.
    As `passion predict --batch` does it."""
    try:
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if (root / BIDS).is_file():
            folders = [folder for folder in folders if folder.name.startswith("sub-")]
        found: dict[str, Path] = {}
        for folder in folders:
            visits = {f"{folder.name}_{visit.name}": visit for visit in sessions(folder)}
            for name, place in (visits or {folder.name: folder}).items():
                if name in found:
                    raise BatchError(f"{root}: two folders would be called {name}: {found[name]} and {place}")
                found[name] = place
    except OSError as error:
        raise BatchError(f"{error.filename or root}: cannot be read ({error.strerror})") from None
    if not found:
        raise BatchError(f"{root}: holds no folders; --batch takes a folder with one folder for each patient")
    return [Patient(name, folder) for name, folder in found.items()]


def form_of_batch(form: Mapping[str, str], fields: Mapping[str, Any]) -> dict[str, str]:
    """The words of a form, and that it may wait behind others' where the service (`Client.fields`) knows of that."""
    waits = "batch" in fields.get("priority", {}).get("enum", ())
    return {"priority": "batch", **form} if waits else dict(form)


class Batch:
    """Patients of one folder, by way of a service, into another folder."""

    def __init__(self, out: Path, report: Report, names: FileNames, say: Say) -> None:
        """Use `Batch.opened`."""
        self._out = out
        self._report = report
        self._names = names
        self._say = say
        self._rows = {row.patient: row for row in report.patients}
        self._lock = threading.Lock()
        self._stop = threading.Event()

    @classmethod
    @contextmanager
    def opened(cls, out: Path, wanted: Report, names: FileNames, say: Say) -> Iterator[Batch]:
        """The batch in `out`, new or to go on with, held by this process alone. Raises `BatchError` for a folder that
        cannot be written, is in use, or holds what was made in another way."""
        with _held(out):
            if (out / REPORT).exists():
                before = _read(out / REPORT)
                for name in ("form", "save"):
                    was, now = getattr(before, name), getattr(wanted, name)
                    if was != now:
                        raise BatchError(f"{out}: made with {name} {was}, not {now}: choose another folder")
                wanted = wanted.model_copy(update={"patients": before.patients})
            yield cls(out, wanted, names, say)

    def run(self, patients: list[Patient], url: str, key: str | None, at_once: int, keep: bool) -> list[Row]:
        """Take every patient through, `at_once` of them at a time, and return their rows. `keep`: leave the jobs.

        Raises `BatchError` if the service stays away, and KeyboardInterrupt; what was sent then goes on at the service,
        and the next run takes it up.
        """
        for patient in patients:
            if not (self._out / REPORT).exists() and self._mask(patient.name).exists():
                raise BatchError(f"{self._mask(patient.name)} exists, and no {REPORT}: choose another folder")
        self._save()
        patience = Patience(away=AWAY, full=math.inf, sleep=self._sleep)
        with Client(url, key, patience) as client, ThreadPoolExecutor(at_once) as pool:
            futures = [pool.submit(self._take, client, patient, keep) for patient in patients]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._stop.set()
                for future in futures:
                    future.cancel()
                raise
        return [self._rows[patient.name] for patient in patients]

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise StoppedError

    def _take(self, client: Client, patient: Patient, keep: bool) -> None:
        began = time.monotonic()
        row = Row(patient=patient.name, state="failed", request=str(uuid.uuid4()))
        try:
            scans = self._names.find(patient.folder)
            before = self._rows.get(patient.name)
            files = _stamped(scans)
            if before is not None and before.files == files:
                if before.state == "done" and all((self._out / name).is_file() for name in before.results):
                    self._say(f"{patient.name}: done before")
                    return
                if before.state == "sent":
                    row = before
            elif before is not None and before.state == "sent" and before.job is not None:
                self._forget(client, before.job)  # of other scans
            row = row.model_copy(update={"state": "sent", "files": files, "warnings": scans.warnings})
            row.left = {str(path.relative_to(patient.folder)): why for path, why in scans.left.items()}
            job = self._job(client, row, scans)
            row.missing = job["modalities"]["missing"]
            job = client.wait(job, lambda _job: None)
            written = save(client, job, self._mask(patient.name), self._report.save)
            _fill(row, job, scans, written)
        except StoppedError:
            return
        except BatchError:
            raise
        except (ClientError, FolderError) as error:
            if isinstance(error, ClientError) and _away(error):
                raise BatchError(f"{error}; what was sent is remembered: the same command goes on") from error
            row.state, row.error = "failed", str(error)
        except Exception as error:  # the next patient may be fine
            said = (str(error).splitlines() or ["no message"])[0]
            row.state, row.error = "failed", f"{type(error).__name__}: {said}"
        if row.state == "failed":
            self._mask(patient.name).unlink(missing_ok=True)
        row.seconds = round(time.monotonic() - began, 2)
        self._record(row)
        volumes = ", ".join(f"{name} {ml:.2f} mL" for name, ml in row.volumes_ml.items())
        self._say(f"{patient.name}: {row.state}{': ' if volumes or row.error else ''}{row.error or volumes}")
        if row.job is not None and not keep:
            self._forget(client, row.job)

    def _job(self, client: Client, row: Row, scans: Scans) -> dict[str, Any]:
        """The patient's job: that of before, if the service still has it, else a new one."""
        if row.job is not None:
            try:
                return client.look(row.job)
            except ClientError as error:
                if error.status not in GONE:
                    raise
                row.job, row.request = None, str(uuid.uuid4())
        # A mask of other scans must not stay beside a row that says `sent`.
        self._mask(row.patient).unlink(missing_ok=True)
        self._record(row)
        self._say("\n".join(f"{row.patient}: {line}" for line in (*scans.said, *scans.warnings)))
        job = client.submit(scans.files, self._report.form, lambda _size: None, row.request)
        row.job = job["links"]["self"]
        self._record(row)
        return job

    def _mask(self, patient: str) -> Path:
        return self._out / f"{patient}.nii.gz"

    def _forget(self, client: Client, address: str) -> None:
        with suppress(ClientError):
            client.delete({"links": {"self": address}})

    def _record(self, row: Row) -> None:
        with self._lock:
            self._rows[row.patient] = row.model_copy()
            self._save()

    def _save(self) -> None:
        """Write the report as it stands. Raises `BatchError`."""
        self._report.patients = [self._rows[name] for name in sorted(self._rows)]
        try:
            _write(self._out / REPORT, self._report.model_dump_json(indent=1) + "\n")
            _write(self._out / TABLE, _table(self._report.patients))
        except OSError as error:
            raise BatchError(f"{self._out}: cannot write the report ({error.strerror})") from None


def _fill(row: Row, job: dict[str, Any], scans: Scans, written: list[Path]) -> None:
    row.state, row.error = "done", None
    row.results = [path.name for path in written]
    row.volumes_ml = {name: round(ml, 4) for name, ml in job["volumes_ml"].items()}
    row.labels = {str(label["value"]): label["name"] for label in job["labels"] if label["value"]}
    row.warnings = [*scans.warnings, *job["warnings"]]
    row.model, row.weights_sha256 = job["model"], job["weights_sha256"]


def _away(error: ClientError) -> bool:
    import httpx  # as the client has it

    return isinstance(error.__cause__, httpx.TransportError)


def _table(rows: list[Row]) -> str:
    regions = list(dict.fromkeys(region for row in rows for region in row.volumes_ml))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    volumes = [f"{region}_ml" for region in regions]
    rest = ("warnings", "error", "seconds", "mask", "labels", "model", "weights_sha256")
    table.writerow(["patient", "state", "modalities", "missing", *volumes, *rest])
    for row in rows:
        found = [row.volumes_ml.get(region, "") for region in regions]
        labels = "; ".join(f"{value} {name}" for value, name in row.labels.items())
        told = ["; ".join(row.warnings), row.error or "", row.seconds, next(iter(row.results), ""), labels]
        lists = ["+".join(row.files), "+".join(row.missing)]
        table.writerow([row.patient, row.state, *lists, *found, *told, row.model, row.weights_sha256])
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


@contextmanager
def _held(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise BatchError(f"{out}: cannot use this folder ({error.strerror})") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchError(f"{out}: another --batch is at work here") from None
        for partial in out.glob(".*.tmp"):  # of a run that was killed
            partial.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


def _read(path: Path) -> Report:
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BatchError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError:
        raise BatchError(f"{path}: no report of such a batch, or a damaged one: choose another folder") from None


def _stamped(scans: Scans) -> dict[str, File]:
    stamped = {}
    for name, path in scans.files.items():
        stat = path.stat()
        place = str(path.relative_to(scans.folder))
        stamped[name] = File(path=place, bytes=stat.st_size, modified_ns=stat.st_mtime_ns)
    return stamped
