"""A job's life from outside: waiting, running, stopped, killed, out of time."""

import json
import os
import re
import signal
import time
from itertools import chain
from pathlib import Path

import psutil
import pytest
from scans import SMALL, scan

LONG = (128, 128, 128)
"""Half a minute of work for one thread."""


@pytest.fixture(scope="module")
def long_scan():
    return scan("t2", LONG)


@pytest.fixture(scope="module")
def short_scan():
    return scan("t2", SMALL)


def mask_status(stack, job):
    response = stack.http.get(f"/jobs/{job['id']}/mask")
    return response.status_code, response.headers["content-type"]


PROBLEM = "application/problem+json"


def test_from_queued_to_succeeded_and_deleted(stack, short_scan):
    ready = {"status": "ready", "workers": 1, "children": 1, "waiting": 0, "models": ["tiny"]}
    assert stack.http.get("/readyz").json() == ready
    job = stack.post({"flair": short_scan}).json()
    job = stack.finished(job)
    assert (job["state"], job["percent"], job["attempts"]) == ("succeeded", 100.0, 1)
    assert job["created"] <= job["started"] <= job["finished"]
    assert set(job["volumes_ml"]) == {"WT", "TC", "ET"}
    assert job["expected_dice"]["dice"] == {"WT": 0.5, "TC": 0.25, "ET": None}
    assert [label["value"] for label in job["labels"]] == [0, 1, 2, 3]
    assert mask_status(stack, job) == (200, "application/gzip")
    files = sorted(str(p.relative_to(stack.store / job["id"])) for p in (stack.store / job["id"]).rglob("*.gz"))
    assert [re.sub("mask-[0-9a-f]{16}", "mask-RUN", file) for file in files] == [
        "input/flair.nii.gz",
        "output/mask-RUN.nii.gz",
    ]
    assert stack.http.delete(f"/jobs/{job['id']}").status_code == 204
    assert job["id"] not in stack.on_store()
    assert stack.http.get(f"/jobs/{job['id']}").status_code == 404
    assert mask_status(stack, job) == (404, PROBLEM)
    assert stack.http.delete(f"/jobs/{job['id']}").status_code == 404


def test_the_log_tells_of_a_job_by_its_id_from_upload_to_deletion(stack, short_scan):
    job = stack.finished(stack.post({"t2": short_scan}).json())
    assert mask_status(stack, job)[0] == 200
    assert stack.http.delete(f"/jobs/{job['id']}").status_code == 204
    end = time.monotonic() + 60
    # The last lines of both processes come just after what is seen from outside.
    while not {"job succeeded", "DELETE"} <= set(chain.from_iterable(lines := log_of(stack, job["id"]))):
        assert time.monotonic() < end, lines
        time.sleep(0.05)
    worker = [line for line in lines if line[0] == "worker" and "model loaded" not in line]
    assert worker == [
        ("worker", "job started"),
        *[("worker", "stage ended", s) for s in ("loading", "normalising", "segmenting", "restoring", "saving")],
        ("worker", "job succeeded"),
    ]
    api = [line for line in lines if line[0] == "app.web" and line[2:] != ("GET", "/jobs/{job_id}")]
    assert api == [
        ("app.web", "upload begins"),
        ("app.web", "job accepted"),
        ("app.web", "request", "POST", "/segment"),
        ("app.web", "request", "GET", "/jobs/{job_id}/mask"),
        ("app.web", "job deleted"),
        ("app.web", "request", "DELETE", "/jobs/{job_id}"),
    ]


def log_of(stack, job_id):
    """The lines about a job, in short; one that names it elsewhere than it should is none."""
    lines = (stack.store.parent / "log").read_text().splitlines()
    found = [json.loads(line) for line in lines if job_id in line]
    assert [line for line in found if line.get("job_id") != job_id] == []
    names = ("logger", "event", "stage", "method", "route")
    return [tuple(line[name] for name in names if name in line) for line in found]


def test_a_running_job_is_stopped_and_a_queued_one_never_begins(stack, long_scan, short_scan):
    running = stack.post({"t2": long_scan}).json()
    queued = stack.post({"t2": long_scan}).json()
    last = stack.post({"t2": short_scan}).json()
    assert last["position"] >= 2
    seen = stack.until(running, lambda j: j["stage"] == "segmenting" and j["percent"] > 16)
    assert (seen["state"], seen["position"]) == ("running", None)
    assert stack.job(queued)["position"] == 1
    assert mask_status(stack, running) == (409, PROBLEM)
    assert mask_status(stack, queued) == (409, PROBLEM)
    for job in (queued, running):
        assert stack.http.delete(f"/jobs/{job['id']}").status_code == 204
        assert stack.job(job)["state"] == "cancelled"
        assert job["id"] not in stack.on_store()
        assert mask_status(stack, job) == (410, PROBLEM)
    began = time.monotonic()
    assert stack.finished(last)["state"] == "succeeded"
    assert time.monotonic() - began < 20, "the worker went on with a cancelled job"
    for job in (running, queued):
        after = stack.job(job)
        assert (after["state"], after["volumes_ml"]) == ("cancelled", None)
        assert job["id"] not in stack.on_store()
    assert stack.job(queued)["attempts"] == 0


def test_a_killed_child_does_not_lose_its_job(stack, long_scan):
    job = stack.post({"t2": long_scan}).json()
    stack.until(job, lambda j: j["stage"] == "segmenting")
    _, children = stack.children()
    os.kill(children[0].pid, signal.SIGKILL)
    again = stack.until(job, lambda j: j["attempts"] == 2)
    assert again["state"] == "running"
    events = [words for line in log_of(stack, job["id"]) for words in line]
    assert "a worker was lost: its job waits again" not in events, "it waited for the lease to lapse"
    stack.http.delete(f"/jobs/{job['id']}")


def test_the_workers_parent_never_maps_torch(stack, short_scan):
    stack.mask({"t2": short_scan})
    parent, children = stack.children()
    assert "libtorch" not in Path(f"/proc/{parent.pid}/maps").read_text()
    assert any("libtorch" in Path(f"/proc/{child.pid}/maps").read_text() for child in children)


def succeed_once(stack, files):
    for _ in range(10):
        if stack.finished(stack.post({"t2": files}).json())["state"] == "succeeded":
            return
    pytest.fail("no job succeeds")


@pytest.mark.slow
def test_a_job_that_takes_too_long_fails_with_a_reason(own_stack, long_scan, short_scan):
    """At the soft limit by the task itself, at the hard one (a child that does not react) by the worker's parent."""
    with own_stack(PASSION_SOFT_TIME_LIMIT="3", PASSION_HARD_TIME_LIMIT="4") as stack:
        succeed_once(stack, short_scan)  # so that the model is loaded, which on a busy machine takes longer than that
        soft = stack.finished(stack.post({"t2": long_scan}).json())
        assert soft["state"] == "failed"
        assert soft["error"]["title"] == "The time limit was reached"
        assert mask_status(stack, soft) == (410, PROBLEM)
        hung = stack.post({"t2": long_scan}).json()
        stack.until(hung, lambda j: j["stage"] == "segmenting")
        _, children = stack.children()
        psutil.Process(children[0].pid).suspend()
        hard = stack.finished(hung, within=30)
        assert hard["error"]["title"] == "The time limit was reached"
        succeed_once(stack, short_scan)
        assert stack.http.get("/readyz").status_code == 200
