"""`JobQueue`: hands job ids to the workers. Every Celery setting of ours is in this file, with its reason."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import redis

from app.jobs.lines import BEFORE, SEPARATOR, STEPS, Line, lists
from app.jobs.record import Job
from app.jobs.settings import Settings

if TYPE_CHECKING:
    from celery import Celery

TASK = "passion.segment"


class QueueError(ConnectionError):
    """The broker did not take the message."""


def celery_app(settings: Settings) -> Celery:
    """The Celery application, the same for those who send and those who work."""
    from celery import Celery  # here, so that reading a job does not wait for Celery to be imported

    app = Celery("passion", broker=settings.redis_url, set_as_current=False)
    app.conf.update(celery_settings(settings))
    return app


def celery_settings(settings: Settings) -> dict[str, Any]:
    """Celery's settings, chosen knowingly.

    The job record in Redis (`JobStore`) is the truth and Celery only carries ids, so a message may arrive twice, late,
    or for a job that is over: the task asks the record first. That makes at-least-once delivery safe, and all choices
    below follow from it.
    """
    return {
        # --- what travels ---
        # JSON only. A message is one job id; pickle would let whoever can write to Redis run code in the worker.
        "task_serializer": "json",
        "accept_content": ["json"],
        # A queue for each `Line`, which come with the models; what a worker consumes is in `worker.serving`.
        "task_default_queue": BEFORE,
        "task_create_missing_queues": True,
        # No result backend: results are the job record and the mask on the store.
        "result_backend": None,
        "task_ignore_result": True,
        # --- delivery ---
        # Acknowledged after the work, not before it: a worker that vanishes leaves its message behind.
        "task_acks_late": True,
        # A child that is killed (out of memory, a crash in a kernel) gives its message back at once instead of after
        # a lease's time. Celery would do that without end; attempts are counted and capped in the job record.
        "task_reject_on_worker_lost": True,
        # A task that raised or ran out of time is over: it has written so into the record.
        "task_acks_on_failure": True,
        "task_acks_on_timeout": True,
        # One message at a time per child. A second one held in reserve would wait behind a job of minutes while
        # another worker is idle; with late acknowledgement 1 means that nothing is reserved beyond what runs.
        "worker_prefetch_multiplier": 1,
        # Redis has no acknowledgements, so Celery puts a message back when it was not acknowledged for this long. We
        # do not wait for that: whose worker is gone is known by its lease, and the reaper sends a new message. So this
        # only has to be longer than any job can run; the old message is then one for a job that is over.
        "broker_transport_options": {
            # Read where the address is that of Sentinels.
            "master_name": settings.redis_master,
            "visibility_timeout": int(settings.hard_time_limit) + 300,
            "socket_connect_timeout": settings.redis_timeout,
            "socket_keepalive": True,
            "health_check_interval": 30,
            # Interactive jobs of all lines come before any of priority batch; lines take turns.
            "priority_steps": list(STEPS.values()),
            "sep": SEPARATOR,
        },
        # A certificate is looked at, unless the address itself says otherwise. Celery's own default is not to.
        "broker_use_ssl": settings.redis_url.startswith("rediss://") and {"ssl_cert_reqs": ssl.CERT_REQUIRED},
        # --- limits ---
        # Soft: raises inside the task, which says why it stops. Hard: the parent kills the child and says it for it.
        "task_soft_time_limit": settings.soft_time_limit,
        "task_time_limit": settings.hard_time_limit,
        # --- processes ---
        # Prefork with one child per GPU. The parent never imports torch: a CUDA context made before a fork is unusable
        # after it, and a child that crashes must not take the consumer with it. The child imports torch when it
        # starts, loads a model at its first job and keeps it, so it is not recycled after so many tasks.
        "worker_pool": "prefork",
        "worker_concurrency": settings.concurrency,
        "worker_max_tasks_per_child": None,
        # A child imports torch before it says that it is there; Celery's own 4 seconds would kill it on a busy machine.
        "worker_proc_alive_timeout": 300.0,
        # --- coming and going ---
        # Redis may start after the worker, and may come back at any time.
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        # A job goes on when the broker's connection is lost for a moment: should its message be delivered again
        # meanwhile, the record's `run` lets only one of the two write a result.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        # Told to stop, the worker gives the running job this long, then puts it back in the queue for another one.
        "worker_soft_shutdown_timeout": settings.stop_grace,
        # A request must not hang on a broker that is away: try, try once more, then the sender gets a 503.
        "task_publish_retry": True,
        "task_publish_retry_policy": {"max_retries": 1, "interval_start": 0.1, "interval_max": 0.1},
        "broker_connection_timeout": settings.redis_timeout,
        # --- quiet ---
        # Nobody listens to events or remote control; `Presence` says who consumes. Workers need not know each other.
        "worker_enable_remote_control": False,
        "worker_send_task_events": False,
        "task_send_sent_event": False,
        # Our own JSON logs, ids only.
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "enable_utc": True,
        "timezone": "UTC",
    }


class JobQueue:
    """Sends job ids to the workers."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._app: Celery | None = None
        self._lock = threading.Lock()

    def open(self) -> None:
        """Import Celery now rather than with the first job."""
        # One thread at a time: Celery's lazy modules are found half made by a second one.
        with self._lock:
            if self._app is None:
                self._app = celery_app(self._settings)
                self._app.amqp.queues  # noqa: B018 - made now, for the same reason

    def submit(self, job: Job) -> None:
        """Put a job in its line. Raises `QueueError` if the broker does not take it."""
        from kombu.exceptions import OperationalError

        self.open()
        assert self._app is not None
        try:
            queue, step = Line.of(job).queue, STEPS[job.priority]
            self._app.send_task(TASK, args=[job.id], task_id=job.id, queue=queue, priority=step)
        except (OperationalError, OSError) as error:
            raise QueueError("the queue does not answer") from error

    def message_ids(self, client: redis.Redis, jobs: Iterable[Job]) -> set[str]:
        """Ids of all jobs that a message speaks of in the lines of these. Celery's Redis transport keeps a queue as
        lists of JSON documents whose headers name the task; the id of ours is the job's."""
        queues = sorted({Line.of(job).queue for job in jobs} | {BEFORE})
        with client.pipeline(transaction=True) as pipe:  # a message that is moved is in one of them
            for name in (name for queue in queues for name in lists(queue)):
                pipe.lrange(name, 0, -1)
            found = cast("list[list[str]]", pipe.execute())
        return {str(json.loads(message).get("headers", {}).get("id")) for messages in found for message in messages}

    def close(self) -> None:
        """Close the connections to the broker."""
        if self._app is not None:
            self._app.close()
            self._app = None
