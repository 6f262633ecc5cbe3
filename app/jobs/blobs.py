"""`BlobStore`: the files of the jobs, one folder each."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from app.jobs.record import Job

MASK = "mask.nii.gz"


class BlobStore:
    """`<root>/<job id>/input/<modality>.nii.gz` and `<root>/<job id>/output/mask.nii.gz`.

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
            # Renamed first, so that a worker that is writing into it finds the folder gone rather than half there.
            doomed = self.root / f".deleted-{job_id}-{secrets.token_hex(4)}"
            try:
                os.rename(folder, doomed)
            except FileNotFoundError:
                continue
            shutil.rmtree(doomed, ignore_errors=True)

    def inputs(self, job: Job) -> dict[str, Path]:
        """The uploaded files by modality, in the order given."""
        return {item.modality: self.root / job.id / "input" / item.filename for item in job.inputs}

    def mask(self, job_id: str) -> Path:
        """Where the mask is, or will be."""
        return self.root / job_id / "output" / MASK

    def _incoming(self, job_id: str) -> Path:
        return self.root / f".incoming-{job_id}"
