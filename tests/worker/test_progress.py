import pytest

from app.jobs.connection import connect
from app.jobs.record import InputFile, Job, new_id
from app.jobs.store import JobOverError, JobStore
from worker.progress import INTERVAL, SHARES, Progress


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def store(settings):
    client = connect(settings)
    yield JobStore(client, settings)
    client.close()


@pytest.fixture
def job(store):
    job = Job(id=new_id(), model="m", inputs=(InputFile(modality="t2", filename="t2.nii"),))
    store.create(job)
    return store.begin(job.id, "w")


def test_stages_follow_each_other_from_0_to_99():
    edges = [edge for share in SHARES.values() for edge in share]
    assert edges == sorted(edges)
    assert (edges[0], edges[-1]) == (0.0, 99.0)


def test_writes_on_a_new_stage_and_else_every_half_second(store, job):
    clock = Clock()
    progress = Progress(store, job, clock)
    seen = []
    for moment, stage, fraction in [
        (0.0, "loading", 0.0),
        (0.1, "loading", 0.5),
        (0.2, "segmenting", 0.0),
        (0.3, "segmenting", 0.25),
        (0.2 + INTERVAL, "segmenting", 0.5),
        (0.3 + INTERVAL, "segmenting", 0.6),
        (0.4 + INTERVAL, "restoring", 2.0),
    ]:
        clock.now = moment
        progress(stage, fraction)
        now = store.get(job.id)
        seen.append((now.stage, now.percent))
    assert seen == [
        ("loading", 0.0),
        ("loading", 0.0),
        ("segmenting", 15.0),
        ("segmenting", 15.0),
        ("segmenting", 55.0),
        ("segmenting", 55.0),
        ("restoring", 99.0),
    ]


def test_a_cancelled_run_hears_of_it_at_the_next_write(store, job):
    clock = Clock()
    progress = Progress(store, job, clock)
    progress("segmenting", 0.1)
    store.cancel(job.id)
    progress("segmenting", 0.2)
    clock.now = INTERVAL
    with pytest.raises(JobOverError):
        progress("segmenting", 0.3)
