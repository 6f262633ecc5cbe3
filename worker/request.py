"""`SegmentRequest`: what the worker's parent knows of a job in a child, and does when the child can do nothing more."""

from __future__ import annotations

from typing import Any

import structlog
from billiard.einfo import ExceptionWithTraceback
from celery.exceptions import WorkerLostError
from celery.worker.request import Request
from redis import RedisError

from app.jobs.connection import connect
from app.jobs.settings import Settings
from app.jobs.store import JobStore
from worker.reasons import time_limit_reached

log = structlog.get_logger("worker")


class SegmentRequest(Request):
    """Celery's view of one message (`Task.Request`). Runs in the parent, which never imports torch."""

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        """A child is gone, or its task raised. Celery gives the message of a lost child back at once, so the run's
        lease must end before that: whoever gets the message would otherwise find the job in live hands."""
        why = exc_info.exception
        if isinstance(why, ExceptionWithTraceback):  # as billiard hands over what it raised itself
            why = why.exc
        if isinstance(why, WorkerLostError | SystemExit | KeyboardInterrupt):
            settings = Settings()
            try:
                JobStore(connect(settings), settings).process_ended(self.id, self.hostname)
            except RedisError:
                log.warning("redis does not answer: the job is found when its lease lapses", job_id=self.id)
        super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """A time limit. At the soft one the task writes its own end; at the hard one the child is killed."""
        super().on_timeout(soft, timeout)
        if soft:
            return
        log.error("killed at the hard time limit", job_id=self.id)
        settings = Settings()
        try:
            failure = time_limit_reached(settings)
            JobStore(connect(settings), settings).fail_run_of(self.id, self.hostname, failure)
        except RedisError:
            log.error("redis does not answer: the job is found when its lease lapses", job_id=self.id)
