"""The real thing: `passion-server up` in a process of its own, with its Redis, its API and its worker."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from app.children import end_with_parent

READY_WITHIN = 120
STOPPED_WITHIN = 30


class Stack:
    """A running service, and what a test may ask of it from outside."""

    def __init__(self, process, url, store, models):
        self.process = process
        self.url = url
        self.store = store
        self.models = models
        self.http = httpx.Client(base_url=url, timeout=60)

    def post(self, files, **data):
        """POST /segment; `files` is name to bytes or path, in order."""
        parts = [
            (name, ("upload", data if isinstance(data, bytes) else Path(data).read_bytes()))
            for name, data in (files.items() if isinstance(files, dict) else files)
        ]
        return self.http.post("/segment", files=parts, data=data)

    def job(self, job):
        return self.http.get(job["links"]["self"]).json()

    def until(self, job, condition, within=120):
        """Poll until `condition(job)`."""
        end = time.monotonic() + within
        while not condition(job := self.job(job)):
            assert job["state"] in ("queued", "running"), job
            assert time.monotonic() < end, job
            time.sleep(0.05)
        return job

    def finished(self, job, within=120):
        return self.until(job, lambda j: j["state"] not in ("queued", "running"), within)

    def mask(self, files, **data):
        """The bytes of the mask for these files, and the finished job."""
        response = self.post(files, **data)
        assert response.status_code == 202, response.text
        job = self.finished(response.json())
        assert job["state"] == "succeeded", job
        return self.http.get(job["links"]["mask"]).content, job

    def on_store(self):
        return sorted(path.name for path in self.store.iterdir() if path.name != ".redis")

    def children(self):
        """psutil processes: the worker's parent, and its pool's children."""
        celery = [
            p for p in psutil.Process(self.process.pid).children() if "worker.celery_app" in " ".join(p.cmdline())
        ]
        assert len(celery) == 1
        return celery[0], celery[0].children()


@contextmanager
def running_stack(folder, models, keep=True, within=(), **environment):
    """A stack of its own, torn down whatever happens; fails if it leaves a process behind. `keep`: with a store.
    `within`: a command that runs the rest of its command line."""
    store = folder / "store"
    kept = ["--store", str(store)] if keep else []
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PASSION_") and k != "REDIS_URL"}
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        [*within, sys.executable, "-m", "app.cli", "up", "--port", "0", "--models", str(models), *kept],
        env=inherited | {"OMP_NUM_THREADS": "1", "PASSION_STOP_GRACE": "1", "PASSION_DEVICE": "cpu"} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        start_new_session=True,
        preexec_fn=end_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 - also if pytest is killed
        text=True,
    )
    watch = threading.Timer(READY_WITHIN, process.kill)
    watch.start()
    family = []
    try:
        line = process.stdout.readline()
        watch.cancel()
        found = re.search(r"http://\S+", line)
        assert found, (folder / "log").read_text()[-3000:]
        stack = Stack(process, found.group(), store, models)
        yield stack
        stack.http.close()
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
    finally:
        watch.cancel()
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOPPED_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        process.stdout.close()
        log.close()
    left = [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    for p in left:
        p.kill()
    assert not left
