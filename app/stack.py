"""`run_stack`: Redis, API and one worker under one command, started together and stopped together."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import redis

from app.children import Children
from app.jobs.cards import ModelShelf
from app.jobs.connection import connect
from app.jobs.keys import KeyStore
from app.jobs.settings import Settings
from app.redis_server import FOLDER, RedisServer

READY_WITHIN = 60.0
POLL = 0.1


class StackError(RuntimeError):
    """The stack did not come up or did not stay up. The message says which part."""


def worker_command() -> list[str]:
    """Starts a worker. Celery by name and not by import: the service knows nothing of torch."""
    celery = [sys.executable, "-m", "celery", "--quiet", "-A", "worker.celery_app", "worker"]
    # Its name is its own, also beside others on this host; workers have nothing to say to each other.
    name = f"passion-{secrets.token_hex(3)}@%h"
    return [*celery, "--hostname", name, "--without-gossip", "--without-mingle", "--without-heartbeat"]


def worker_environment(environment: dict[str, str]) -> dict[str, str]:
    """SIGTERM, as container engines and service managers send it, ends Celery as `stop_grace` has it: the running job
    gets that long and then goes back to the queue. Celery's own reading of SIGTERM waits for it without end."""
    return environment | {"REMAP_SIGTERM": "SIGQUIT"}


def run_stack(settings: Settings, keep: bool, own_redis: bool, announce: Callable[[str, str | None], None]) -> int:
    """Run until a signal (0) or until a part ends by itself (1). Raises `StackError` if it does not come up.

    Without a Redis of the user's one is started. Records then live as long as the files do: with `keep` both are under
    `settings.store`, else both are temporary, and so is the one API key that is then made where keys are asked for:
    nobody could make one otherwise. `announce` is given the address and that key when jobs can be sent.
    """
    if not ModelShelf(settings.models).names():
        raise StackError(f"no model in {settings.models}: name a folder of checkpoint folders with --models")
    stop = threading.Event()
    children = Children()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():  # asked twice: no more waiting
            children.kill()
        stop.set()

    with ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, on_signal))
        if not keep:
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="passion-"))
            settings = settings.model_copy(update={"store": Path(temporary) / "jobs"})
        stack.callback(lambda: children.stop(settings.stop_grace + 5))
        if own_redis:
            folder = settings.store / FOLDER if keep else settings.store.parent / "redis"
            settings = settings.model_copy(update={"redis_url": _start_redis(folder, keep, children, stop)})
        listener = stack.enter_context(listen(settings.host, settings.port))
        url = _url(settings.host, listener.getsockname()[1])
        environment = os.environ | settings.environment()
        children.start("worker", worker_command(), worker_environment(environment))
        api = [sys.executable, "-m", "app.cli", "api", "--fd", str(listener.fileno())]
        children.start("API", api, environment, pass_fds=[listener.fileno()])
        _await_ready(url, children, stop)
        if not stop.is_set():
            announce(url, _first_key(settings) if own_redis and not keep and settings.guarded else None)
        while not stop.wait(POLL):
            ended = children.ended()
            if ended is not None:
                raise StackError(f"the {ended.name} ended by itself with status {ended.process.returncode}")
    return 0


def _first_key(settings: Settings) -> str:
    with connect(settings) as client:
        return KeyStore(client).create("first")[1]


def _start_redis(folder: Path, keep: bool, children: Children, stop: threading.Event) -> str:
    for _ in range(5):  # somebody else may take the free port between our asking and the server's
        server = RedisServer(folder, keep)
        child = children.start("Redis", server.command(), os.environ)
        client = connect(Settings(redis_url=server.url))
        end = time.monotonic() + 10
        while child.process.poll() is None and time.monotonic() < end and not stop.is_set():
            try:
                client.ping()
                return server.url
            except redis.RedisError:
                time.sleep(POLL)
        children.stop(1)
        if stop.is_set():
            return server.url
    raise StackError("Redis does not start; its words are above")


def listen(host: str, port: int) -> socket.socket:
    """Taken here and handed to the API, so that nobody can take the port in between and port 0 is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StackError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port"
        ) from error
    listener.listen(128)
    listener.set_inheritable(True)
    return listener


def _url(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def _await_ready(url: str, children: Children, stop: threading.Event) -> None:
    end = time.monotonic() + READY_WITHIN
    last = "it does not answer"
    while not stop.wait(POLL):
        ended = children.ended()
        if ended is not None:
            raise StackError(
                f"the {ended.name} ended with status {ended.process.returncode} before the stack was ready"
            )
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=2):
                return
        except urllib.error.HTTPError as error:
            last = error.read().decode("utf-8", "replace")
        except OSError as error:
            last = str(error)
        if time.monotonic() > end:
            raise StackError(f"not ready after {READY_WITHIN:g} s: {last}")
