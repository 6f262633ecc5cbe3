"""The Celery application: `celery -A worker.celery_app worker`. The parent process never imports torch.

What each setting is for stands in `app.jobs.queue`.
"""

from __future__ import annotations

import importlib
from typing import Any

import structlog
from celery import bootsteps, signals
from celery.exceptions import TimeLimitExceeded
from redis import RedisError

from app.jobs.connection import connect
from app.jobs.logs import configure, where
from app.jobs.presence import INTERVAL, Presence
from app.jobs.queue import QUEUE, TASK, celery_app
from app.jobs.record import Failure
from app.jobs.settings import Settings
from app.jobs.store import JobStore
from worker.checkpoints import pick_device

settings = Settings()
app = celery_app(settings)
app.conf.include = ["worker.task"]
log = structlog.get_logger("worker")


@signals.setup_logging.connect
def setup_logging(**_: Any) -> None:
    """Our logs instead of Celery's."""
    configure(settings)


class Consuming(bootsteps.StartStopStep):
    """Vouches for this worker in `Presence` for as long as its event loop turns with the queue's consumer in it."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **_: Any) -> None:
        self._presence = Presence(connect(settings))
        self._timer: Any = None

    def start(self, consumer: Any) -> None:
        """Called when the consumer has (again) a connection to the broker."""
        self._renew(consumer)
        self._timer = consumer.timer.call_repeatedly(INTERVAL, self._renew, (consumer,))

    def stop(self, consumer: Any) -> None:
        """Called when it loses that, and at the end."""
        if self._timer is not None:
            consumer.timer.cancel(self._timer)
            self._timer = None
        try:
            self._presence.leave(consumer.hostname)
        except RedisError:
            log.warning("redis does not answer: this worker's name will lapse by itself")

    shutdown = stop

    def _renew(self, consumer: Any) -> None:
        tasks = consumer.task_consumer
        if tasks is None or not tasks.consuming_from(QUEUE):
            return
        try:
            self._presence.renew(consumer.hostname)
        except RedisError:
            log.warning("redis does not answer: this worker cannot be seen")


app.steps["consumer"].add(Consuming)


@signals.worker_process_init.connect
def import_torch(**_: Any) -> None:
    """Import torch in each child (never in the parent) before it takes a job: an import that a time limit interrupts
    half-way cannot be done again in the same process. A precision that the device lacks is told now."""
    try:
        importlib.import_module("models.predictor")
        importlib.import_module("models.precision").check_precision(settings.precision, pick_device(settings.device))
    except ValueError as error:  # every job meets it again, and fails with this reason
        log.error("jobs will fail", reason=str(error))
    except Exception as error:  # the first job meets it again, and fails with a reason
        log.error("the models package cannot be imported", where=where(error))


@signals.task_failure.connect
def out_of_time(sender: Any = None, task_id: str = "", exception: BaseException | None = None, **_: Any) -> None:
    """Write down what a child could not: the parent killed it at the hard limit. All else the task writes itself."""
    if getattr(sender, "name", None) == TASK and isinstance(exception, TimeLimitExceeded):
        JobStore(connect(settings), settings).fail_whatever_runs(task_id, time_limit_reached(settings))
        log.error("killed at the hard time limit", job_id=task_id)


def time_limit_reached(settings: Settings) -> Failure:
    """Why a job that took too long has failed."""
    return Failure(
        title="The time limit was reached",
        detail=f"The job ran for more than {settings.soft_time_limit:g} s. Crop or resample the volumes, or ask the "
        "operator for a faster worker or a higher PASSION_SOFT_TIME_LIMIT.",
    )
