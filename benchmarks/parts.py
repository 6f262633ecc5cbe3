"""`Parts`: Redis, API and workers as processes of their own, each of which may be killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import redis

from app.children import end_with_parent
from app.jobs.connection import connect
from app.jobs.settings import Settings
from app.jobs.store import JobStore
from app.redis_server import RedisServer, free_port
from app.stack import worker_command, worker_environment

PATIENCE = 60.0


def until(condition, within: float = PATIENCE, what: str = "nothing", pause: float = 0.05):
    """What `condition()` gives once that is true of it. Raises `TimeoutError`."""
    end = time.monotonic() + within
    while True:
        if found := condition():
            return found
        if time.monotonic() > end:
            raise TimeoutError(f"{what}, after {within:g} s")
        time.sleep(pause)


class Parts:
    """Use it as a context: everything that it started is ended then. Redis keeps an append-only file."""

    def __init__(self, folder: Path, models: Path, **settings: object) -> None:
        """`settings`: as `Settings` has them. The store is `folder/store`, the logs are `folder/log`."""
        self._folder = folder
        self._redis_server = RedisServer(folder / "redis", keep=True)
        self._redis_command = self._redis_server.command()
        self._log = (folder / "log").open("ab")
        self.port = free_port()
        self.settings = Settings(
            redis_url=self._redis_server.url,
            store=folder / "store",
            models=models,
            device="cpu",
            port=self.port,
            **settings,  # type: ignore[arg-type] # pydantic checks what the type checker cannot
        )
        self.redis: subprocess.Popen[bytes] | None = None
        self.api: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []
        self._others: list[subprocess.Popen[bytes]] = []
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        self.client = connect(self.settings)
        self.jobs = JobStore(self.client, self.settings)

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        for process in [*self.workers, *self._others, self.api, self.redis]:
            if process is not None:
                kill(process)
        self._log.close()
        self.client.close()

    def start_redis(self) -> None:
        """Returns when it answers and has read its file."""
        self.redis = self._start(self._redis_command, dict(os.environ))
        until(self._redis_answers, what="Redis does not answer")

    def _redis_answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False

    def start_api(self) -> None:
        """Returns when it answers."""
        self.api = self._start([sys.executable, "-m", "app.cli", "api"], self._environment())
        until(self._alive, what="the API does not answer")

    def start_another_api(self, **settings: object) -> str:
        """Its address, once it answers. `settings`: in which it differs from the first."""
        own = self.settings.model_copy(update={"port": free_port(), **settings})
        self._others.append(self._start([sys.executable, "-m", "app.cli", "api"], self._environment(own)))
        url = f"http://127.0.0.1:{own.port}"
        until(lambda: self._alive(url), what="another API does not answer")
        return url

    def _alive(self, url: str = "") -> bool:
        try:
            return self.http.get(f"{url}/livez", timeout=1).is_success
        except httpx.HTTPError:
            return False

    def start_worker(self, **settings: object) -> subprocess.Popen[bytes]:
        """Returns at once; `ready` waits. `settings`: in which it differs from the others."""
        own = self.settings.model_copy(update=settings)
        worker = self._start(worker_command(), worker_environment(self._environment(own)))
        self.workers.append(worker)
        return worker

    def ready(self, workers: int) -> None:
        """Wait until so many workers consume."""
        until(lambda: self._consuming() >= workers, what=f"there are no {workers} workers")

    def _consuming(self) -> int:
        try:
            return int(self.http.get("/readyz", timeout=2).json().get("workers", 0))
        except (httpx.HTTPError, ValueError):
            return 0

    def kill_worker(self, worker: subprocess.Popen[bytes]) -> None:
        """SIGKILL to the worker with all its processes, as when its machine is switched off."""
        self.workers.remove(worker)
        kill(worker)

    def worker_of(self, job: dict) -> subprocess.Popen[bytes]:
        """The worker whose child runs the job."""
        name = self.jobs.get(job["id"]).worker
        (worker,) = [w for w in self.workers if name.split("@")[0] in " ".join(psutil.Process(w.pid).cmdline())]
        return worker

    def child_of(self, worker: subprocess.Popen[bytes]) -> psutil.Process:
        """A worker's (first) pool process."""
        return psutil.Process(worker.pid).children()[0]

    def post(self, files: dict[str, bytes], form: dict[str, str] | None = None, **headers: str) -> httpx.Response:
        """POST /segment; `files` by modality, `form`: its words."""
        parts = [(name, ("upload", data)) for name, data in files.items()]
        named = {k.replace("_", "-"): v for k, v in headers.items()}
        return self.http.post("/segment", files=parts, data=form, headers=named)

    def job(self, job: dict) -> dict:
        """As it is now."""
        found: dict = self.http.get(job["links"]["self"]).raise_for_status().json()
        return found

    def finished(self, job: dict, within: float = PATIENCE) -> dict:
        """Once it is over."""
        final = {"succeeded", "failed", "cancelled"}
        return until(lambda: (j := self.job(job))["state"] in final and j, within, f"{job['id']} is not over")

    def running(self, job: dict, stage: str = "segmenting", within: float = PATIENCE) -> dict:
        """Once a worker is at that stage of it."""
        return until(lambda: (j := self.job(job))["stage"] == stage and j, within, f"{job['id']} does not run", 0.01)

    def on_store(self) -> set[str]:
        """Names of the folders there."""
        return {path.name for path in self.settings.store.iterdir()}

    def log(self) -> str:
        """What all of them have said."""
        return (self._folder / "log").read_text()

    def _environment(self, settings: Settings | None = None) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PASSION_") and k != "REDIS_URL"}
        return {"OMP_NUM_THREADS": "1"} | inherited | (settings or self.settings).environment()

    def _start(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            preexec_fn=end_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 - also if we are killed
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
