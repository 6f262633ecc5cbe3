"""`BucketStore`: the files of the jobs in a bucket, and on this machine those that are being worked on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from app.jobs.blobs import Blobs, BlobStore, Reading
from app.jobs.bucket import Bucket
from app.jobs.record import Job, is_id
from app.jobs.settings import Settings

PATIENT = (1.0, 2.0, 4.0, 8.0)
"""For a worker, which has computed for minutes."""
HASTY = (0.5,)
"""For an API, whose client waits."""


def blobs_of(settings: Settings, pauses: tuple[float, ...] = HASTY) -> Blobs:
    """The store that the settings name. `pauses`: see `Bucket`."""
    bench = BlobStore(settings.store)
    if not settings.bucket:
        return bench
    return BucketStore(bench, Bucket(settings.bucket, pauses), settings.hard_time_limit + settings.orphans_kept)


class BucketStore:
    """`<job id>/input/...` and `<job id>/output/...`, named as in `BlobStore`, which is the bench here: what is on its
    way in or out.

    An upload is sent when it is whole, and its record is made after that; a run's results are sent before the record
    says that it has succeeded. So a reader, who begins with the record, sees all of a job's files or none. What was
    sent without a record is swept, as in a folder.
    """

    def __init__(self, bench: BlobStore, bucket: Bucket, benched: float) -> None:
        """`benched`: seconds after which nobody can be at work any more on what lies on the bench."""
        self._bench = bench
        self._bucket = bucket
        self._benched = benched
        self._looked = 0.0

    def open(self) -> None:
        """As `BlobStore.open`, of the bench."""
        self._bench.open()

    def ping(self) -> None:
        """Return if the bucket answers."""
        self._bucket.ping()

    def incoming(self, job_id: str) -> Path:
        """As `BlobStore.incoming`."""
        return self._bench.incoming(job_id)

    def refuse(self, job_id: str) -> None:
        """As `BlobStore.refuse`."""
        self._bench.refuse(job_id)

    def accept(self, job_id: str) -> None:
        """Send what has come in."""
        self._bench.accept(job_id)
        folder = self._bench.root / job_id
        for path in sorted((folder / "input").iterdir()):
            self._bucket.put(path, f"{job_id}/input/{path.name}")
        self._bench.discard(folder)

    def delete(self, job_id: str) -> None:
        """Remove whatever there is of a job, here and in the bucket."""
        self._bench.delete(job_id)
        self._bucket.delete(list(self._bucket.objects(f"{job_id}/")))

    def inputs(self, job: Job) -> dict[str, Path]:
        """The uploaded files, fetched to the bench."""
        self._bench.open()
        self._tidy()
        files = self._bench.inputs(job)
        for name in ("input", "output"):
            (self._bench.root / job.id / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in files.values():
            if not path.exists():
                self._bucket.get(self._key(path), path)
        return files

    def mask(self, job: Job) -> Path:
        """As `BlobStore.mask`, on the bench; so are the others."""
        return self._bench.mask(job)

    def preview(self, job: Job) -> Path:
        """As `BlobStore.preview`."""
        return self._bench.preview(job)

    def dicom_seg(self, job: Job) -> Path:
        """As `BlobStore.dicom_seg`."""
        return self._bench.dicom_seg(job)

    def probability(self, job: Job, place: int) -> Path:
        """As `BlobStore.probability`."""
        return self._bench.probability(job, place)

    def keep(self, job: Job) -> None:
        """Send what the run has written."""
        for path in sorted((self._bench.root / job.id / "output").glob(f"*-{job.run}.*")):
            self._bucket.put(path, self._key(path))

    def leave(self, job: Job) -> None:
        """Clear the bench of a job."""
        self._bench.delete(job.id)

    def read(self, result: Path) -> Reading:
        """A result, fetched into a file of its own. Raises `FileNotFoundError`."""
        copy = self._bench.scrap()
        self._bucket.get(self._key(result), copy)
        return Reading(copy, temporary=True)

    def link(self, result: Path, seconds: int, media_type: str, name: str | None) -> str | None:
        """An address at the store. Raises `FileNotFoundError`."""
        if not self._bucket.exists(self._key(result)):
            raise FileNotFoundError
        return self._bucket.link(self._key(result), seconds, media_type, name)

    def discard_results(self, job: Job) -> None:
        """Remove all that a run that came to nothing has written, and sent."""
        self._bench.discard_results(job)
        sent = self._bucket.objects(f"{job.id}/output/")
        self._bucket.delete([key for key in sent if f"-{job.run}." in key])

    def folders(self, older_than: float) -> Iterator[tuple[str, Path]]:
        """As `BlobStore.folders`: of the bench, and of the bucket, where one is as old as its latest object. There it
        looks only now and then, for a list of all there is takes time. What was never sent to its end goes, too; what
        is named otherwise than files of jobs is not ours."""
        self._bench.discard_scraps(older_than)
        yield from self._bench.folders(older_than)
        if time.monotonic() - self._looked < older_than / 10:
            return
        self._looked = time.monotonic()
        self._bucket.abort_parts(older_than, lambda key: _job_of(key) is not None)
        latest: dict[str, float] = {}
        for key, written in self._bucket.objects().items():
            job_id = _job_of(key)
            if job_id is not None:
                latest[job_id] = max(written, latest.get(job_id, 0.0))
        limit = time.time() - older_than
        yield from ((job_id, Path(job_id)) for job_id, written in latest.items() if written < limit)

    def discard(self, folder: Path) -> None:
        """Remove one of `folders`."""
        if folder.is_absolute():
            self._bench.discard(folder)
        else:
            self.delete(folder.name)

    def _tidy(self) -> None:
        """Clear the bench of what processes that were killed have left."""
        for _, folder in self._bench.folders(self._benched):
            self._bench.discard(folder)

    def _key(self, path: Path) -> str:
        return path.relative_to(self._bench.root).as_posix()


def _job_of(key: str) -> str | None:
    """The id of the job whose file an object is."""
    job_id, _, rest = key.partition("/")
    return job_id if rest and is_id(job_id) else None
