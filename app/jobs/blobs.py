"""`BlobStore`: the files of the jobs, one folder each."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from app.jobs.record import Job

INCOMING, DOOMED = ".incoming-", ".deleted-"
_ID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_NAME = re.compile(rf"(?:{re.escape(INCOMING)})?(?P<job>{_ID})|{re.escape(DOOMED)}(?P<deleted>{_ID})-\w+")


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

    def incoming(self, job_id: str) -> Path:
        """A new folder for the files of an upload that is not yet accepted."""
        folder = self._incoming(job_id)
        (folder / "input").mkdir(parents=True, mode=0o700)
        (folder / "output").mkdir(mode=0o700)
        return folder / "input"

    def accept(self, job_id: str) -> None:
        """Turn the incoming folder into the job's own."""
        os.rename(self._incoming(job_id), self.root / job_id)

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
