import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.jobs.connection import connect
from app.jobs.record import Failure, InputFile, Job, JobState, new_id
from app.jobs.store import JobOverError, JobStore, UnknownJobError

REASON = Failure(title="no", detail="not at all")


@pytest.fixture
def store(settings):
    client = connect(settings)
    yield JobStore(client, settings)
    client.close()


def new_job():
    return Job(id=new_id(), model="m", inputs=(InputFile(modality="t2", filename="t2.nii"),), missing=("t1",))


@pytest.fixture
def job(store):
    job = new_job()
    store.create(job)
    return job


def test_a_record_comes_back_as_it_went_in(store, job):
    assert store.get(job.id) == job
    assert store.get(job.id).given == ("t2",)


def test_an_unknown_id(store):
    with pytest.raises(UnknownJobError):
        store.get("nothing")
    with pytest.raises(UnknownJobError):
        store.cancel("nothing")
    assert store.begin("nothing", "w") is None
    assert store.position(new_job()) is None
    store.remove("nothing")


def test_positions_move_up_as_jobs_begin_and_are_cancelled(store):
    jobs = [new_job() for _ in range(4)]
    for job in jobs:
        store.create(job)
    assert [store.position(j) for j in jobs] == [1, 2, 3, 4]
    store.begin(jobs[0].id, "w")
    store.cancel(jobs[2].id)
    assert [store.position(j) for j in jobs] == [None, 1, None, 2]


def test_a_run_from_beginning_to_end(store, job):
    run = store.begin(job.id, "w")
    assert run is not None
    assert (run.state, run.attempts, run.stage) == (JobState.RUNNING, 1, "starting")
    store.progress(run, "segmenting", 40.0)
    assert (store.get(job.id).stage, store.get(job.id).percent) == ("segmenting", 40.0)
    done = store.succeed(run, {"WT": 1.5}, "abc")
    assert done == store.get(job.id)
    assert (done.state, done.volumes_ml, done.percent) == (JobState.SUCCEEDED, {"WT": 1.5}, 100.0)
    assert done.created <= done.started <= done.finished


@pytest.mark.parametrize("end", ["cancel", "succeed", "fail"])
def test_what_is_over_stays_as_it_is(store, job, end):
    run = store.begin(job.id, "w")
    {
        "cancel": lambda: store.cancel(job.id),
        "succeed": lambda: store.succeed(run, {}, ""),
        "fail": lambda: store.fail(run, REASON),
    }[end]()
    before = store.get(job.id)
    assert before.state.final
    assert store.begin(job.id, "w") is None
    store.fail_run_of(job.id, "w", REASON)
    for change in (
        lambda: store.progress(run, "loading", 1.0),
        lambda: store.succeed(run, {}, ""),
        lambda: store.fail(run, REASON),
        lambda: store.release(run),
        lambda: store.cancel(job.id),
    ):
        with pytest.raises(JobOverError):
            change()
    assert store.get(job.id) == before


def test_jobs_that_are_over_expire_and_others_stay(settings):
    client = connect(settings)
    store = JobStore(client, settings.model_copy(update={"cancelled_kept": 0.2, "retention": 0.4}))
    waits, cancelled, failed = new_job(), new_job(), new_job()
    for job in (waits, cancelled, failed):
        store.create(job)
    store.cancel(cancelled.id)
    store.fail(store.begin(failed.id, "w"), REASON)
    assert store.expired() == []
    time.sleep(0.3)
    assert store.expired() == [cancelled.id]
    time.sleep(0.2)
    assert store.expired() == [cancelled.id, failed.id]
    store.remove(cancelled.id)
    assert store.expired() == [failed.id]
    assert not store.exists(cancelled.id)
    client.close()


def test_only_the_latest_run_may_write(store, job):
    lost = store.begin(job.id, "w")
    assert store.begin(job.id, "v") is None, "its run is alive"
    store.process_ended(job.id, "v")
    assert store.begin(job.id, "v") is None, "it is not v's"
    store.process_ended(job.id, "w")
    again = store.begin(job.id, "v")
    assert (again.attempts, again.started) == (2, lost.started)
    assert again.run != lost.run
    assert store.owns(again)
    assert not store.owns(lost)
    with pytest.raises(JobOverError):
        store.succeed(lost, {}, "")
    store.succeed(again, {}, "")


def test_attempts_are_capped(store, job, settings):
    for attempt in range(settings.max_attempts):
        assert store.begin(job.id, "w").attempts == attempt + 1
        store.process_ended(job.id, "w")
    assert store.begin(job.id, "w") is None
    failed = store.get(job.id)
    assert failed.state is JobState.FAILED
    assert failed.quarantined
    assert "ended 3 times" in failed.error.detail


def test_a_released_job_is_first_in_line_and_its_attempt_does_not_count(store, job):
    later = new_job()
    store.create(later)
    run = store.begin(job.id, "w")
    store.release(run)
    back = store.get(job.id)
    assert (back.state, back.attempts, back.started) == (JobState.QUEUED, 0, None)
    assert (store.position(job), store.position(later)) == (1, 2)
    with pytest.raises(JobOverError):
        store.progress(run, "loading", 0.0)


def test_a_run_that_died_is_failed_by_whoever_noticed(store, job):
    store.begin(job.id, "w")
    store.fail_run_of(job.id, "another", REASON)
    assert store.get(job.id).state is JobState.RUNNING
    store.fail_run_of(job.id, "w", REASON)
    assert store.get(job.id).error == REASON


def test_removed_is_unknown(store, job):
    run = store.begin(job.id, "w")
    store.remove(job.id)
    assert not store.owns(run)
    with pytest.raises(JobOverError):
        store.progress(run, "loading", 0.0)
    with pytest.raises(UnknownJobError):
        store.get(job.id)


def test_of_a_cancel_and_a_begin_at_once_the_cancel_holds(store):
    """Whatever the order, a cancelled job is never seen running afterwards."""
    for _ in range(30):
        job = new_job()
        store.create(job)
        barrier = threading.Barrier(3)

        def together(action, job=job, barrier=barrier):
            barrier.wait()
            return action(job.id)

        def begin(job_id):
            return store.begin(job_id, "w")

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(together, [begin, store.cancel, begin]))
        assert store.get(job.id).state is JobState.CANCELLED
        assert store.position(job) is None


def test_of_many_who_finish_at_once_one_does(store, job):
    run = store.begin(job.id, "w")

    def finish(number):
        try:
            store.succeed(run, {"WT": float(number)}, "")
        except JobOverError:
            return None
        return number

    with ThreadPoolExecutor(6) as pool:
        winners = [n for n in pool.map(finish, range(6)) if n is not None]
    assert len(winners) == 1
    assert store.get(job.id).volumes_ml == {"WT": float(winners[0])}


def test_a_record_with_unknown_fields_is_read(store, job, settings):
    client = connect(settings)
    newer = job.model_dump_json()[:-1] + ', "newer": 5}'
    client.set(f"passion:job:{job.id}", newer)
    client.close()
    assert store.get(job.id) == job
