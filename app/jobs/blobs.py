"""`Blobs`: the files of the jobs; `BlobStore`: in a folder, one folder each."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from app.jobs.record import Job

INCOMING, DOOMED, SCRAP = ".incoming-", ".deleted-", ".scrap-"
_ID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_NAME = re.compile(rf"(?:{re.escape(INCOMING)})?(?P<job>{_ID})|{re.escape(DOOMED)}(?P<deleted>{_ID})-\w+")


@dataclass(frozen=True)
class Reading:
    """A result to be read here."""

    path: Path
    temporary: bool = False
    """Whether the reader is to remove it."""


class Blobs(Protocol):
    """Where the files of the jobs are: `BlobStore`, or `BucketStore` of `app.jobs.bucket_store`. Besides `OSError` a
    bucket's methods raise `StoreAwayError`."""

    def open(self) -> None:
        """Make ready what there is on this machine."""

    def ping(self) -> None:
        """Return if the store answers."""

    def incoming(self, job_id: str) -> Path:
        """A new folder for the files of an upload that is not yet accepted."""

    def refuse(self, job_id: str) -> None:
        """Remove what came in of an upload that is not accepted."""

    def accept(self, job_id: str) -> None:
        """Make the files of an upload the job's own."""

    def delete(self, job_id: str) -> None:
        """Remove whatever there is of a job; quiet if there is nothing."""

    def inputs(self, job: Job) -> dict[str, Path]:
        """The uploaded files by modality, in the order given, here."""

    def mask(self, job: Job) -> Path:
        """Where the mask of the job's run is to be written; so the next three."""

    def preview(self, job: Job) -> Path:
        """The picture of the mask."""

    def dicom_seg(self, job: Job) -> Path:
        """The mask as DICOM SEG."""

    def probability(self, job: Job, place: int) -> Path:
        """The probabilities of a region, by its place among the job's."""

    def keep(self, job: Job) -> None:
        """Put what the run has written where it is to stay."""

    def leave(self, job: Job) -> None:
        """Clear away what only a run needed."""

    def read(self, result: Path) -> Reading:
        """A result, which one of the four names. Raises `FileNotFoundError`."""

    def link(self, result: Path, seconds: int, media_type: str, name: str | None) -> str | None:
        """Where anybody can fetch a result for so long, to be saved under a name; None if only by way of an API. Raises
        `FileNotFoundError`."""

    def discard_results(self, job: Job) -> None:
        """Remove all that a run that came to nothing has written; quiet if there is nothing."""

    def folders(self, older_than: float) -> Iterator[tuple[str, Path]]:
        """What has not changed for so many seconds, each with the id of the job that it belongs to, or did."""

    def discard(self, folder: Path) -> None:
        """Remove one of those."""


class BlobStore:
    """`<root>/<job id>/input/<modality>.nii.gz` (`.zip` for a DICOM series) and
    `<root>/<job id>/output/mask-<run>.nii.gz`: each run has a mask of its own, so that one which was thought dead
    cannot replace its successor's. Beside it, in the run's name too, lie `preview-<run>.png`, `dicom-seg-<run>.dcm` and
    `probability-<place among the regions>-<run>.nii.gz`.

    A folder whose name starts with a dot is being filled or being deleted; one without is whole. Both changes are one
    rename, so a reader sees all of a job's files or none. Methods raise `OSError` as the file system does.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self) -> None:
        """Make the root, readable by this user alone. Raises `OSError` where that cannot be."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = self.root / f".probe-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()

    def ping(self) -> None:
        """A folder answers."""

    def incoming(self, job_id: str) -> Path:
        """A new folder for the files of an upload that is not yet accepted."""
        folder = self._incoming(job_id)
        (folder / "input").mkdir(parents=True, mode=0o700)
        (folder / "output").mkdir(mode=0o700)
        return folder / "input"

    def accept(self, job_id: str) -> None:
        """Turn the incoming folder into the job's own."""
        os.rename(self._incoming(job_id), self.root / job_id)

    def refuse(self, job_id: str) -> None:
        """Remove the incoming folder."""
        self.discard(self._incoming(job_id))

    def delete(self, job_id: str) -> None:
        """Remove whatever there is of a job, incoming or accepted; quiet if there is nothing."""
        for folder in (self._incoming(job_id), self.root / job_id):
            self.discard(folder)

    def inputs(self, job: Job) -> dict[str, Path]:
        """The uploaded files by modality, in the order given."""
        return {item.modality: self.root / job.id / "input" / item.filename for item in job.inputs}

    def mask(self, job: Job) -> Path:
        """Where the mask of the job's run is, or will be."""
        return self._output(job) / f"mask-{job.run}.nii.gz"

    def preview(self, job: Job) -> Path:
        """Where the picture of the run's mask is, or will be."""
        return self._output(job) / f"preview-{job.run}.png"

    def dicom_seg(self, job: Job) -> Path:
        """Where the run's mask as DICOM SEG is, or will be."""
        return self._output(job) / f"dicom-seg-{job.run}.dcm"

    def probability(self, job: Job, place: int) -> Path:
        """Where the probabilities of a region are, or will be, by its place among the job's. The name of a region is
        the model's, and no name for a file."""
        return self._output(job) / f"probability-{place}-{job.run}.nii.gz"

    def keep(self, job: Job) -> None:
        """What the run has written is where it is to stay."""

    def leave(self, job: Job) -> None:
        """The files of a run are the job's."""

    def read(self, result: Path) -> Reading:
        """The result as it is. Raises `FileNotFoundError`."""
        result.stat()
        return Reading(result)

    def link(self, result: Path, seconds: int, media_type: str, name: str | None) -> str | None:
        """Nothing in a folder can be fetched but by way of an API."""

    def scrap(self) -> Path:
        """A name for a file that is removed soon."""
        return self.root / f"{SCRAP}{secrets.token_hex(8)}"

    def discard_scraps(self, older_than: float) -> None:
        """Remove such files that nobody removed."""
        for path in self.root.glob(f"{SCRAP}*"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - older_than:
                    path.unlink()

    def discard_results(self, job: Job) -> None:
        """Remove all that a run that came to nothing has written; quiet if there is nothing."""
        with suppress(OSError):
            for path in list(self._output(job).glob(f"*-{job.run}.*")):
                path.unlink(missing_ok=True)

    def folders(self, older_than: float) -> Iterator[tuple[str, Path]]:
        """All folders whose last change (of the folder itself) is more than `older_than` seconds ago, each with the id
        of the job that it is named after, or was before it was to be deleted."""
        limit = time.time() - older_than
        for folder in self.root.iterdir():
            named = _NAME.fullmatch(folder.name)
            with suppress(FileNotFoundError):  # gone meanwhile
                if named and folder.stat().st_mtime < limit:
                    yield named["job"] or named["deleted"], folder

    def discard(self, folder: Path) -> None:
        """Remove a folder of the store, whatever it was."""
        # Renamed first, so that a worker that is writing into it finds the folder gone rather than half there.
        if not folder.name.startswith(DOOMED):
            doomed = self.root / f"{DOOMED}{folder.name.removeprefix(INCOMING)}-{secrets.token_hex(4)}"
            try:
                os.rename(folder, doomed)
            except FileNotFoundError:
                return
            folder = doomed
        shutil.rmtree(folder, ignore_errors=True)

    def _output(self, job: Job) -> Path:
        return self.root / job.id / "output"

    def _incoming(self, job_id: str) -> Path:
        return self.root / f"{INCOMING}{job_id}"
