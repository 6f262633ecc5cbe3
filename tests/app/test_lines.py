"""Lines and priorities: what goes where in Redis, and what becomes of those that wait too long."""

import pytest
from pydantic import ValidationError

from app.jobs.lines import BEFORE, Line, lists
from app.jobs.names import MISSING, UNSERVED
from app.jobs.presence import Consumer, Presence
from app.jobs.queue import JobQueue
from app.jobs.reaper import MISSING_FOR, TURN, Reaper
from app.jobs.record import InputFile, Job, JobState, new_id
from app.jobs.settings import Settings
from app.jobs.store import JobStore


@pytest.fixture
def store(client, settings):
    return JobStore(client, settings)


def add(store, **of):
    job = Job(id=new_id(), inputs=(InputFile(modality="t2", filename="t2.nii.gz"),), **{"model": "m"} | of)
    return store.create(job)


def lengths(client, line):
    return [client.llen(name) for name in lists(line.queue)]


def go_round(client, settings):
    reaper = Reaper(client, settings)
    client.delete(TURN)
    reaper.round()
    reaper.close()


def test_each_model_and_need_has_its_line_and_each_line_two_lists(store, client, settings):
    queue = JobQueue(settings)
    for of in ({}, {"priority": "batch"}, {"needs": "cuda"}, {"model": "n"}):
        queue.submit(add(store, **of))
    queue.close()
    assert lengths(client, Line("any", "m")) == [1, 1]
    assert lengths(client, Line("cuda", "m")) == [1, 0]
    assert lengths(client, Line("any", "n")) == [1, 0]
    assert client.exists(BEFORE) == 0


def test_a_place_is_one_in_a_line_and_interactive_jobs_come_first(store):
    batch, first, other, second = (
        add(store, **of) for of in ({"priority": "batch"}, {}, {"model": "n", "needs": "cuda"}, {})
    )
    assert [store.position(job) for job in (first, second, batch, other)] == [1, 2, 3, 1]
    run = store.begin(batch.id, "w")
    store.release(run)
    assert [store.position(job) for job in (first, second, batch)] == [1, 2, 3], "back, but to its own"
    store.cancel(first.id)
    assert [store.position(job) for job in (first, second, batch)] == [None, 1, 2]
    store.remove(second.id)
    assert store.position(batch) == 1


def test_a_job_of_an_older_version_has_a_place(store, client):
    job = add(store)
    client.delete("passion:line:passion.any.m")
    assert store.position(job) == 1


def test_a_batch_job_that_has_waited_long_enough_counts_as_interactive(store, client, settings):
    batch, later = add(store, priority="batch"), add(store, priority="batch")
    queue = JobQueue(settings)
    queue.submit(batch)
    client.set(f"passion:job:{later.id}", later.model_copy(update={"queued": batch.queued}).model_dump_json())
    go_round(client, settings)
    assert lengths(client, Line("any", "m")) == [0, 1]
    go_round(client, settings.model_copy(update={"batch_wait": 1e-6}))
    assert store.get(batch.id).priority == "interactive"
    assert lengths(client, Line("any", "m")) == [2, 1]
    newer = add(store)
    assert [store.position(job) for job in (batch, later, newer)] == [1, 2, 3]
    assert store.hasten(batch.id) is None
    queue.close()


def test_a_message_is_looked_for_in_all_lists(store, client, settings):
    jobs = [add(store, **of) for of in ({"priority": "batch"}, {"needs": "cuda"}, {"model": "n"})]
    queue = JobQueue(settings)
    for job in jobs:
        queue.submit(job)
    assert queue.message_ids(client, jobs) == {job.id for job in jobs}
    lost = add(store, priority="batch", model="n")
    client.zadd(MISSING, {lost.id: client.time()[0] - MISSING_FOR - 1})
    go_round(client, settings)
    assert lengths(client, Line("any", "n")) == [1, 1]
    queue.close()


def test_a_job_that_nobody_serves_is_given_up_where_there_is_a_limit(store, client, settings):
    jobs = [add(store), add(store, needs="cuda")]
    presence = Presence(client)
    worker = Consumer("w@host", 1, (Line("any", "m").queue,))
    presence.renew(worker)
    assert presence.workers() == [worker]
    long_ago = {job.id: client.time()[0] - 100 for job in jobs}
    client.zadd(UNSERVED, long_ago)
    go_round(client, settings)
    assert [store.get(job.id).state for job in jobs] == [JobState.QUEUED] * 2, "without a limit they wait"
    client.zadd(UNSERVED, long_ago)
    go_round(client, settings.model_copy(update={"unserved_limit": 99.0}))
    served, unserved = (store.get(job.id) for job in jobs)
    assert served.state is JobState.QUEUED
    assert (unserved.state, unserved.error.kind) == (JobState.FAILED, "no-worker")
    assert "a worker that serves m on a GPU for 10" in unserved.error.detail
    assert client.zrange(UNSERVED, 0, -1) == []
    presence.leave(worker)
    assert client.hgetall("passion:serving") == {}


def test_what_a_model_needs():
    settings = Settings(needs="big=cuda, small = CPU,*=any")
    assert [settings.needs_of(name) for name in ("big", "small", "other")] == ["cuda", "cpu", "any"]
    assert Settings(needs="*=cuda").needs_of("m") == "cuda"
    for wrong in ({"needs": "big=tpu"}, {"needs": "big"}, {"serve_devices": "gpu"}):
        with pytest.raises(ValidationError, match=f"PASSION_{next(iter(wrong)).upper()} must"):
            Settings(**wrong)
