"""Jobs that nobody works on, with a real Redis and Celery's own messages in it."""

import time

import pytest
import redis
from own_redis import running

from app.jobs.connection import connect
from app.jobs.lines import Line, lists
from app.jobs.names import MISSING
from app.jobs.queue import JobQueue
from app.jobs.reaper import MISSING_FOR, TURN, Reaper
from app.jobs.record import InputFile, Job, JobState, new_id
from app.jobs.store import JobOverError, JobStore
from app.jobs.tally import Tally

LEASE = 0.3


@pytest.fixture
def quick(settings):
    return settings.model_copy(update={"lease": LEASE})


@pytest.fixture
def store(client, quick):
    return JobStore(client, quick)


@pytest.fixture
def go_round(client, quick):
    """One round, whoever's turn it was."""
    reaper = seasoned(Reaper(client, quick))

    def go():
        client.delete(TURN)
        reaper.round()

    yield go
    reaper.close()


def seasoned(reaper):
    """One that has known Redis for a lease's time."""
    reaper.round()
    time.sleep(LEASE)
    return reaper


def add(store):
    job = Job(id=new_id(), model="m", inputs=(InputFile(modality="t2", filename="t2.nii.gz"),))
    return store.create(job)


def messages(client):
    return sum(client.llen(name) for name in lists(Line("any", "m").queue))


def test_a_run_that_gives_no_sign_is_taken_away_and_its_job_sent_again(store, client, go_round):
    waiting, job = add(store), add(store)
    lost = store.begin(job.id, "dead@host")
    go_round()
    assert store.get(job.id) == lost
    time.sleep(LEASE / 2)
    store.renew(lost)
    time.sleep(LEASE * 0.7)
    go_round()
    assert store.get(job.id) == lost, "it gave a sign"
    time.sleep(LEASE / 2)
    go_round()
    again = store.get(job.id)
    assert (again.state, again.attempts, again.run, again.worker) == (JobState.QUEUED, 1, "", "")
    assert (store.position(job), store.position(waiting)) == (1, 2)
    assert messages(client) == 1
    store.renew(lost)
    assert store.live_runs() == 0, "what was taken away cannot be renewed"
    with pytest.raises(JobOverError):
        store.progress(lost, "segmenting", 50.0)
    assert store.begin(job.id, "other@host").attempts == 2
    assert Tally(client).read().lost == 1


def test_a_run_taken_away_too_often_is_given_up(store, client, go_round, quick):
    job = add(store)
    for attempt in range(quick.max_attempts):
        assert store.get(job.id).state is JobState.QUEUED, attempt
        store.begin(job.id, "dead@host")
        time.sleep(LEASE * 1.2)
        go_round()
    failed = store.get(job.id)
    assert (failed.state, failed.quarantined, failed.error.kind) == (JobState.FAILED, True, "worker-lost")
    assert Tally(client).read().ended == {("failed", "worker-lost"): 1}


def test_a_waiting_job_without_a_message_gets_one(store, client, go_round, quick):
    job, other = add(store), add(store)
    queue = JobQueue(quick)
    queue.submit(other)
    assert queue.message_ids(client, [job]) == {other.id}
    go_round()
    assert messages(client) == 1, "it may be on its way into a worker"
    client.zadd(MISSING, {job.id: client.time()[0] - MISSING_FOR - 1})
    go_round()
    assert queue.message_ids(client, [job]) == {other.id, job.id}
    go_round()
    assert messages(client) == 2
    assert Tally(client).read().resent == 1
    queue.close()


def test_one_round_at_a_time(client, quick, store):
    one, two = seasoned(Reaper(client, quick)), seasoned(Reaper(client, quick))
    job = add(store)
    store.begin(job.id, "dead@host")
    time.sleep(LEASE * 1.2)
    client.delete(TURN)
    one.round()
    store.begin(job.id, "dead@host")
    store.process_ended(job.id, "dead@host")
    two.round()
    assert store.get(job.id).state is JobState.RUNNING, "it was not its turn"
    time.sleep(one.interval)
    two.round()
    assert store.get(job.id).state is JobState.QUEUED
    one.close()
    two.close()


def test_while_redis_was_away_nobody_could_give_a_sign(tmp_path, settings):
    """So no run is taken away before there was time for one."""
    with running(tmp_path / "redis") as url:
        there = settings.model_copy(update={"redis_url": url, "lease": LEASE})
        client = connect(there)
        store, reaper = JobStore(client, there), seasoned(Reaper(client, there))
        soon_tired = connect(there.model_copy(update={"redis_timeout": LEASE / 5}))
        impatient = seasoned(Reaper(soon_tired, there))
        job = add(store)
        store.begin(job.id, "alive@host")
        client.execute_command("CLIENT", "PAUSE", int(1000 * (LEASE * 1.2)))  # nobody is answered meanwhile
        with pytest.raises(redis.RedisError):
            impatient.round()
        time.sleep(LEASE)
        client.delete(TURN)
        impatient.round()
        assert store.get(job.id).state is JobState.RUNNING
        client.delete(TURN)
        reaper.round()
        assert store.get(job.id).state is JobState.QUEUED, "it had been there all the time"
        client.close()
        soon_tired.close()


def test_a_lease_of_a_job_that_is_gone_is_forgotten(store, client, go_round):
    job = add(store)
    store.begin(job.id, "dead@host")
    client.delete(f"passion:job:{job.id}")
    time.sleep(LEASE * 1.2)
    go_round()
    assert store.lapsed() == []
