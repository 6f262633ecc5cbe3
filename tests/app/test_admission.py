"""Limits and Idempotency-Keys, however many uploads end at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from app.jobs.admission import KeyReusedError, QueueFullError, TooManyJobsError
from app.jobs.connection import connect
from app.jobs.record import Failure, InputFile, Job, new_id
from app.jobs.store import JobStore, UnknownJobError


@pytest.fixture
def store(settings):
    client = connect(settings)
    yield JobStore(client, settings.model_copy(update={"queue_limit": 5, "jobs_per_key": 3}))
    client.close()


def new_job(owner="", idempotency="", fingerprint=""):
    inputs = (InputFile(modality="t2", filename="t2.nii.gz"),)
    return Job(id=new_id(), model="m", inputs=inputs, owner=owner, idempotency=idempotency, fingerprint=fingerprint)


def outcomes(store, jobs):
    def create(job):
        try:
            return store.create(job).id
        except (QueueFullError, TooManyJobsError, KeyReusedError) as error:
            return type(error)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(create, jobs))


def test_as_many_wait_as_may(store):
    jobs = [new_job() for _ in range(12)]
    found = outcomes(store, jobs)
    assert found.count(QueueFullError) == 7
    with pytest.raises(QueueFullError):
        store.room("")
    admitted = [name for name in found if isinstance(name, str)]
    assert sorted(job.id for job in store.waiting()) == sorted(admitted)
    store.begin(admitted[0], "w")
    store.room("")


def test_a_key_has_its_share_and_no_name_has_none(store):
    assert outcomes(store, [new_job("k") for _ in range(5)]).count(TooManyJobsError) == 2
    with pytest.raises(TooManyJobsError):
        store.room("k")
    store.create(new_job("other"))
    store.create(new_job(""))
    mine, _ = store.of_owner("k", None, 10)
    store.begin(mine[0].id, "w")
    with pytest.raises(TooManyJobsError):
        store.room("k")
    store.cancel(mine[0].id)
    store.room("k")
    store.remove(mine[1].id)
    assert len(outcomes(store, [new_job("k"), new_job("k")])) == 2


def test_the_same_request_gives_the_same_job(store):
    jobs = [new_job("k", "key", "print") for _ in range(8)]
    found = outcomes(store, jobs)
    assert len(set(found)) == 1
    assert [job.id for job in store.waiting()] == [found[0]]
    assert store.create(new_job("other", "key", "print")).id != found[0], "keys of others are others"
    with pytest.raises(KeyReusedError):
        store.create(new_job("k", "key", "another"))
    run = store.begin(found[0], "w")
    store.fail(run, Failure(title="no", detail="no"))
    assert store.create(new_job("k", "key", "print")).state == "failed"
    store.remove(found[0])
    assert store.create(new_job("k", "key", "another")).id != found[0]


def test_a_repeated_request_is_no_new_one_to_a_full_queue(store):
    first = new_job("", "key", "print")
    outcomes(store, [first])
    outcomes(store, [new_job() for _ in range(6)])
    assert store.create(new_job("", "key", "print")).id == first.id


def test_pages_of_own_jobs_latest_first(store):
    mine = [store.create(new_job("k")).id for _ in range(3)]
    store.create(new_job("other"))
    page, rest = store.of_owner("k", None, 2)
    assert [job.id for job in page] == [mine[2], mine[1]]
    page, rest = store.of_owner("k", rest, 2)
    assert ([job.id for job in page], rest) == ([mine[0]], None)
    store.remove(mine[2])
    assert [job.id for job in store.of_owner("k", None, 5)[0]] == [mine[1], mine[0]]
    with pytest.raises(UnknownJobError):
        store.get(mine[2])
