"""`Sweeper`: removes what nobody may need any more: expired jobs, record and files together, and files of no job."""

from __future__ import annotations

import secrets

import redis
import structlog

from app.jobs.blobs import Blobs
from app.jobs.settings import Settings
from app.jobs.store import JobStore

log = structlog.get_logger("app.jobs")

TURN = "passion:sweeper"
MOST_PAUSE = 30.0


class Sweeper:
    """Runs where the store is at hand, in every API process, and does its round in one of them at a time."""

    def __init__(self, client: redis.Redis, settings: Settings, blobs: Blobs) -> None:
        self._redis = client
        self._jobs = JobStore(client, settings)
        self._blobs = blobs
        self._orphans_kept = settings.orphans_kept
        shortest = min(settings.retention, settings.cancelled_kept, settings.orphans_kept)
        self.interval = min(MOST_PAUSE, shortest / 3)
        """Seconds between two rounds."""

    def round(self) -> None:
        """One round, unless somebody else has just done it. Raises `redis.RedisError` and `OSError`."""
        if not self._redis.set(TURN, secrets.token_hex(4), nx=True, px=max(1, int(900 * self.interval))):
            return
        for job_id in self._jobs.expired():
            # Files first: a job without files says so, files without a job are found by nobody but the next round.
            self._blobs.delete(job_id)
            self._jobs.remove(job_id)
            log.info("job removed: its time was over", job_id=job_id)
        for job_id, folder in self._blobs.folders(self._orphans_kept):
            # An upload is bounded in time, so what still comes in after so long does so no longer.
            if folder.name != job_id or not self._jobs.exists(job_id):
                self._blobs.discard(folder)
                log.warning("files of no job removed", job_id=job_id)
