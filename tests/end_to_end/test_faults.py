"""What may happen to a service that runs for months, done to real processes. After each: no job is lost, none runs for
ever, none has two results, and no file is left that belongs to no job."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from scans import SMALL, scan

from benchmarks.parts import Parts, until

pytestmark = pytest.mark.slow

LEASE = 2.0
ORPHANS_KEPT = 3.0
SECONDS = scan("t2", (48, 48, 48))
"""Some seconds of work for one thread."""
SHORT = scan("t2", SMALL)


@pytest.fixture(scope="module")
def parts(tmp_path_factory, models):
    """Redis, an API, two workers, shared by the tests below: each leaves as many behind as it found."""
    quick = {
        "lease": LEASE,
        "orphans_kept": ORPHANS_KEPT,
        "upload_timeout": 2.5,
        "stop_grace": 1.0,
        "redis_timeout": 1.0,
    }
    with Parts(tmp_path_factory.mktemp("parts"), models, **quick) as parts:
        parts.start_redis()
        parts.start_api()
        for _ in range(2):
            parts.start_worker()
        parts.ready(2)
        yield parts


def no_orphans(parts):
    """Once what may be swept is swept: folders of jobs only, and a mask for each job that has one, and no other."""
    mine = {job["id"]: job for job in parts.http.get("/jobs", params={"limit": 200}).json()["jobs"]}
    until(lambda: parts.on_store() <= set(mine), 5 * ORPHANS_KEPT, "files of no job stay")
    for job_id, job in mine.items():
        masks = list((parts.settings.store / job_id / "output").glob("mask-*"))
        assert len(masks) == (job["state"] == "succeeded"), (job["state"], masks)
    return mine


def test_a_worker_switched_off_loses_no_job(parts):
    """Its whole process group is killed in the middle of a job; another one finishes it, long before any time limit."""
    job = parts.post({"t2": SECONDS}).json()
    parts.running(job)
    parts.kill_worker(parts.worker_of(job))
    killed = time.monotonic()
    done = parts.finished(job, within=60)
    assert (done["state"], done["attempts"]) == ("succeeded", 2)
    assert time.monotonic() - killed < 60
    parts.start_worker()
    parts.ready(2)
    no_orphans(parts)


def test_a_stopped_worker_that_comes_back_changes_nothing(parts):
    """As a machine that was suspended: it wakes up in the middle of a job that another one has finished."""
    job = parts.post({"t2": SECONDS}).json()
    parts.running(job)
    worker = parts.worker_of(job)
    os.killpg(worker.pid, signal.SIGSTOP)
    try:
        done = parts.finished(job, within=60)
        before = parts.http.get(done["links"]["mask"]).content
    finally:
        os.killpg(worker.pid, signal.SIGCONT)
    assert (done["state"], done["attempts"]) == ("succeeded", 2)
    until(lambda: "it is no longer this run's" in parts.log(), 30, "the sleeper did not notice")
    assert parts.job(job) == done
    assert parts.http.get(done["links"]["mask"]).content == before
    parts.ready(2)
    no_orphans(parts)


def test_a_poisonous_input_is_quarantined_and_the_queue_goes_on(parts):
    poison = parts.post({"t2": SECONDS}).json()
    for attempt in (1, 2, 3):
        until(lambda n=attempt: parts.job(poison)["attempts"] == n, 30, f"attempt {attempt} does not begin")
        parts.running(poison)
        parts.child_of(parts.worker_of(poison)).kill()
    failed = parts.finished(poison, within=60)
    assert (failed["state"], failed["attempts"], failed["quarantined"]) == ("failed", 3, True)
    assert failed["error"]["kind"] == "worker-lost"
    assert "ended 3 times" in failed["error"]["detail"]
    assert (parts.settings.store / poison["id"] / "input" / "t2.nii.gz").is_file(), "kept for the operator"
    assert parts.finished(parts.post({"t2": SHORT}).json())["state"] == "succeeded"
    parts.ready(2)
    no_orphans(parts)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_redis_stops_and_comes_back(parts, how):
    """With its append-only file: what was queued and what ran are there, and get done."""
    jobs = [parts.post({"t2": SECONDS if n < 2 else SHORT}).json() for n in range(5)]
    parts.running(jobs[0])
    time.sleep(1.1)  # the file is written once a second; what came within the last one may be lost with a kill
    parts.redis.send_signal(how)
    parts.redis.wait(10)
    refused = parts.post({"t2": SHORT})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert parts.http.get("/readyz").status_code == 503
    time.sleep(1)
    parts.start_redis()
    done = [parts.finished(job, within=90) for job in jobs]
    assert {job["state"] for job in done} == {"succeeded"}
    parts.ready(2)
    assert parts.finished(parts.post({"t2": SHORT}).json())["state"] == "succeeded"
    no_orphans(parts)


def test_the_api_is_killed_during_uploads(parts):
    """At whatever moment: what was answered 202 is done, what was not leaves nothing; with its key a request can be
    sent again without a second job."""
    stop = threading.Event()

    def upload(name):
        answered, broken, number = {}, 0, 0
        while not stop.is_set():
            key = f"{name}-{number}"
            try:
                response = parts.post({"t2": SHORT}, Idempotency_Key=key)
            except httpx.HTTPError:
                broken += 1
                time.sleep(0.05)
                continue  # with the same key
            assert response.status_code == 202, response.text
            answered[key] = response.json()
            number += 1
            time.sleep(0.1)  # all of them are to be done in the end
        return answered, broken

    with ThreadPoolExecutor(4) as pool:
        uploads = [pool.submit(upload, n) for n in range(4)]
        for pause in (0.31, 0.52, 0.4):
            time.sleep(pause)
            parts.api.kill()
            parts.api.wait()
            parts.start_api()
        stop.set()
        found = [upload.result() for upload in uploads]
    assert sum(broken for _, broken in found)
    answered = {key: job for jobs, _ in found for key, job in jobs.items()}
    assert len({job["id"] for job in answered.values()}) == len(answered)
    for job in answered.values():
        done = parts.finished(job, within=90)
        assert done["state"] == "succeeded", done
    mine = no_orphans(parts)
    assert {mine[job["id"]]["state"] for job in answered.values()} == {"succeeded"}
