"""The promises that the rest of the service builds on, read off the real Celery application."""

import subprocess
import sys

import pytest

from app.jobs.connection import connect
from app.jobs.lines import Line
from app.jobs.queue import TASK, JobQueue, QueueError, celery_app
from app.jobs.record import InputFile, Job, new_id
from app.jobs.settings import Settings

JOB = Job(id=new_id(), model="m", inputs=(InputFile(modality="t2", filename="t2.nii.gz"),))


def test_what_is_promised(settings):
    conf = celery_app(settings).conf
    assert conf.worker_pool == "prefork"
    assert conf.worker_concurrency == 1
    assert conf.worker_prefetch_multiplier == 1
    assert conf.task_acks_late
    assert conf.task_reject_on_worker_lost
    assert conf.accept_content == ["json"]
    assert conf.task_serializer == "json"
    assert conf.result_backend is None
    assert conf.task_soft_time_limit < conf.task_time_limit
    assert conf.broker_transport_options["visibility_timeout"] > conf.task_time_limit


@pytest.mark.parametrize("limit", [10.0, 7200.0])
def test_a_message_is_never_visible_again_while_its_job_may_still_run(settings, limit):
    longer = settings.model_copy(update={"soft_time_limit": limit, "hard_time_limit": limit + 60})
    conf = celery_app(longer).conf
    assert conf.broker_transport_options["visibility_timeout"] > limit + 60


def test_a_message_holds_an_id_and_nothing_else(settings):
    queue = JobQueue(settings)
    queue.submit(JOB)
    queue.close()
    client = connect(settings)
    (message,) = client.lrange(Line.of(JOB).queue, 0, -1)
    client.close()
    assert '"task": "passion.segment"' in message
    assert f'"id": "{JOB.id}"' in message
    assert "pickle" not in message


def test_a_broker_that_is_away_is_an_error_soon():
    queue = JobQueue(Settings(redis_url="redis://127.0.0.1:1/0"))
    with pytest.raises(QueueError):
        queue.submit(JOB)
    queue.close()


def test_the_parent_has_the_task_and_no_torch():
    code = (
        "import sys; from worker.celery_app import app; app.loader.import_default_modules();"
        f"assert {TASK!r} in app.tasks, list(app.tasks);"
        "heavy = {'torch', 'monai', 'models', 'nibabel'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
