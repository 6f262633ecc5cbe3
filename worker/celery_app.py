"""The Celery application: `celery -A worker.celery_app worker`. The parent process never imports torch.

What each setting is for stands in `app.jobs.queue`.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import structlog
from celery import bootsteps, signals
from redis import RedisError

from app.jobs.connection import connect
from app.jobs.lines import BEFORE
from app.jobs.logs import configure, where
from app.jobs.presence import INTERVAL, Consumer, Presence
from app.jobs.queue import celery_app
from app.jobs.reaper import Reaper
from app.jobs.settings import Settings
from worker.checkpoints import pick_device
from worker.serving import queues

settings = Settings()
app = celery_app(settings)
app.conf.include = ["worker.task"]
app.conf.task_queues = {name: {"exchange": name, "routing_key": name} for name in (BEFORE, *queues(settings))}
log = structlog.get_logger("worker")


@signals.setup_logging.connect
def setup_logging(**_: Any) -> None:
    """Our logs instead of Celery's."""
    configure(settings)


class Consuming(bootsteps.StartStopStep):
    """Vouches for this worker in `Presence` for as long as its event loop turns with the queue's consumer in it, and
    looks after the jobs of workers that were lost."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **_: Any) -> None:
        client = connect(settings)
        self._presence = Presence(client)
        self._reaper = Reaper(client, settings)
        self._me = Consumer(consumer.hostname, settings.concurrency, tuple(queues(settings)))
        self._timers: list[Any] = []

    def start(self, consumer: Any) -> None:
        """Called when the consumer has (again) a connection to the broker."""
        self._renew(consumer)
        self._timers = [
            consumer.timer.call_repeatedly(INTERVAL, self._renew, (consumer,)),
            consumer.timer.call_repeatedly(self._reaper.interval, self._reap),
        ]

    def stop(self, consumer: Any) -> None:
        """Called when it loses that, and at the end."""
        for timer in self._timers:
            consumer.timer.cancel(timer)
        self._timers.clear()
        try:
            self._presence.leave(self._me)
        except RedisError:
            log.warning("redis does not answer: this worker's name will lapse by itself")

    shutdown = stop

    def _renew(self, consumer: Any) -> None:
        tasks = consumer.task_consumer
        if tasks is None or not tasks.consuming_from(BEFORE):
            return
        self._me = replace(self._me, queues=tuple(queues(settings)))
        for name in self._me.queues:
            if not tasks.consuming_from(name):  # of a model that has come since
                consumer.add_task_queue(name, exchange=name, routing_key=name)
        try:
            self._presence.renew(self._me)
        except RedisError:
            log.warning("redis does not answer: this worker cannot be seen")

    def _reap(self) -> None:
        try:
            self._reaper.round()
        except RedisError:
            log.warning("redis does not answer: lost jobs are looked for later")


app.steps["consumer"].add(Consuming)


@signals.worker_process_init.connect
def import_torch(**_: Any) -> None:
    """Import torch, and all that segments, in each child (never in the parent) before it takes a job: an import that a
    time limit interrupts half-way cannot be done again in the same process. A precision that the device lacks is told
    now."""
    try:
        importlib.import_module("worker.results")
        importlib.import_module("models.precision").check_precision(settings.precision, pick_device(settings.device))
    except ValueError as error:  # every job meets it again, and fails with this reason
        log.error("jobs will fail", reason=str(error))
    except Exception as error:  # the first job meets it again, and fails with a reason
        log.error("the models package cannot be imported", where=where(error))
