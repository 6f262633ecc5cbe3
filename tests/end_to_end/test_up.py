"""`passion-server up` from the shell's side: one command, one Ctrl-C, nothing left."""

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime

import nibabel as nib
import psutil
import pytest
from own_redis import running
from scans import SMALL, scan, write


def family(process):
    return [process, *psutil.Process(process.pid).children(recursive=True)]


def gone(processes):
    _, alive = psutil.wait_procs([p for p in processes if isinstance(p, psutil.Process)], timeout=15)
    return not alive


@pytest.mark.slow
def test_one_signal_stops_all_of_it(own_stack):
    """In a stack that can be reached from elsewhere, and is of use to nobody without a key. Another signal: below."""
    with own_stack(keep=False, PASSION_HOST="0.0.0.0") as stack:
        assert stack.http.get("/models").status_code == 401
        key = stack.process.stdout.readline().removeprefix("API key (shown once): ").strip()
        assert stack.http.get("/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        everyone = family(stack.process)
        names = " ".join(" ".join(p.cmdline()) for p in everyone[1:])
        assert "redis-server" in names
        assert "app.cli api" in names
        assert "worker.celery_app" in names
        stack.process.send_signal(signal.SIGTERM)
        assert stack.process.wait(20) == 0
        assert gone(everyone)


@pytest.mark.slow
def test_killed_outright_it_leaves_no_orphans(own_stack):
    with own_stack() as stack:
        everyone = family(stack.process)
        stack.process.kill()
        stack.process.wait()
        assert gone(everyone)


@pytest.mark.slow
def test_when_a_part_ends_the_rest_is_stopped_and_the_status_says_so(own_stack):
    with own_stack() as stack:
        everyone = family(stack.process)
        parent, _ = stack.children()
        parent.kill()
        assert stack.process.wait(20) == 1
        assert gone(everyone)


@pytest.mark.slow
def test_with_a_store_jobs_outlive_the_service_and_the_interrupted_one_is_finished(own_stack):
    with own_stack(PASSION_STOP_GRACE="0.2") as stack:
        assert stack.http.get("/models").status_code == 200
        done = stack.finished(stack.post({"t2": scan("t2", SMALL)}).json())
        cut = stack.post({"t2": scan("t2", (48, 48, 48))}).json()
        stack.until(cut, lambda j: j["stage"] == "segmenting")
        mask = stack.http.get(done["links"]["mask"]).content
        stack.process.send_signal(signal.SIGTERM)
        assert stack.process.wait(20) == 0
        cut_at = datetime.now(UTC).isoformat()
    with own_stack() as stack:
        assert stack.job(done) == done
        assert stack.http.get(done["links"]["mask"]).content == mask
        finished = stack.finished(cut, within=120)
        assert (finished["state"], finished["attempts"]) == ("succeeded", 1)
        assert finished["finished"] > cut_at, "it was not interrupted"
        everyone = family(stack.process)
        stack.process.send_signal(signal.SIGINT)
        assert stack.process.wait(20) == 0
        assert gone(everyone)


def up(*arguments, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PASSION_") and k != "REDIS_URL"}
    command = [sys.executable, "-m", "app.cli", *arguments]
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
    )


def test_a_port_that_is_taken(models):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = up("up", "--port", str(port), "--models", str(models))
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_model_it_says_so_and_does_not_start(tmp_path):
    done = up("up", "--port", "0", "--models", str(tmp_path))
    assert done.returncode == 1
    assert f"no model in {tmp_path}" in done.stderr


def test_a_setting_that_cannot_be(models):
    done = up("up", "--models", str(models), PASSION_MAX_VOXELS="none")
    assert done.returncode == 2
    assert "PASSION_MAX_VOXELS" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_api_and_worker_apart_with_a_redis_of_ones_own(tmp_path, models):
    with running(tmp_path / "redis") as url, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        environment = os.environ | {"REDIS_URL": url, "OMP_NUM_THREADS": "1", "PASSION_DEVICE": "cpu"}
        shared = ["--models", str(models), "--store", str(tmp_path / "store")]
        parts = [["api", "--port", str(port), *shared], ["worker", *shared]]
        processes = [
            subprocess.Popen([sys.executable, "-m", "app.cli", *part], env=environment, stderr=subprocess.DEVNULL)
            for part in parts
        ]
        try:
            files = write(tmp_path, ("flair",), shape=SMALL)
            out = tmp_path / "mask.nii"
            command = ["segment", "--url", f"http://127.0.0.1:{port}", "--flair", str(files["flair"]), "-o", str(out)]
            end = time.monotonic() + 60
            while (done := up(*command)).returncode == 1 and "cannot reach" in done.stderr:
                assert time.monotonic() < end
            assert done.returncode == 0, done.stderr
            assert nib.load(out).shape == SMALL
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait(20)
    # uvicorn ends by the very signal that it was sent, once it has closed down in order.
    assert [p.returncode for p in processes] == [-signal.SIGTERM, 0]
