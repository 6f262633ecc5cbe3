"""Lines between real processes: workers take what they serve, and interactive jobs before those of priority batch."""

import shutil

import pytest
from scans import SMALL, scan

from benchmarks.parts import Parts, until

pytestmark = pytest.mark.slow

LONG, SHORT = scan("t2", (48, 48, 48)), scan("t2", SMALL)


@pytest.fixture
def parts(tmp_path, models):
    shelf = tmp_path / "shelf"
    for name in ("tiny", "large"):
        shutil.copytree(models / "tiny", shelf / name)
    with Parts(tmp_path, shelf, default_model="tiny", needs="large=cuda", lease=2.0) as parts:
        parts.start_redis()
        parts.start_api()
        yield parts


def test_each_worker_takes_its_own_and_what_is_interactive_first(parts):
    on_cpu = parts.start_worker()
    parts.ready(1)
    for_gpu = parts.post({"t2": SHORT}, {"model": "large"}).json()
    assert (for_gpu["position"], for_gpu["waiting_for"]) == (1, "a worker that serves large on a GPU")

    busy = parts.post({"t2": LONG}).json()
    parts.running(busy)
    batch = parts.post({"t2": SHORT}, {"priority": "batch"}).json()
    assert (batch["priority"], batch["waiting_for"]) == ("batch", None)
    interactive = [parts.post({"t2": SHORT}).json() for _ in range(2)]
    metrics = parts.http.get("/metrics").text
    assert 'passion_line_depth{model="large",needs="cuda",priority="interactive"} 1.0' in metrics
    done = [parts.finished(job) for job in (*interactive, batch)]
    assert {job["state"] for job in done} == {"succeeded"}
    starts = [job["started"] for job in done]
    assert starts == sorted(starts), "the one of priority batch, which came first, is the last"

    shutil.copytree(parts.settings.models / "tiny", parts.settings.models / "late")
    late = parts.post({"t2": SHORT}, {"model": "late"}).json()
    assert parts.finished(late)["state"] == "succeeded", "a model that came after the worker"
    assert parts.job(for_gpu)["state"] == "queued"

    # On this machine it computes on the processor, too: what it serves is what it says.
    for_large = parts.start_worker(serve_devices="cuda", serve_models="large")
    assert parts.finished(for_gpu)["state"] == "succeeded"
    assert parts.worker_of(for_gpu) is for_large
    assert all(parts.worker_of(job) is on_cpu for job in (busy, batch, *interactive, late))
    until(lambda: parts.client.llen("passion.cuda.large") == 0, what="messages are left")
