"""A real Redis for the length of a test."""

import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import redis

from app.jobs.connection import connect
from app.jobs.settings import Settings
from app.redis_server import RedisServer


@contextmanager
def running(folder: Path, keep: bool = False):
    """Its URL, while it runs."""
    server = RedisServer(folder, keep)
    process = subprocess.Popen(server.command(), stdout=subprocess.DEVNULL)
    try:
        client = connect(Settings(redis_url=server.url))
        for _ in range(200):
            try:
                client.ping()
                break
            except redis.RedisError:
                assert process.poll() is None, "redis-server ended"
                time.sleep(0.05)
        client.close()
        yield server.url
    finally:
        process.kill()
        process.wait()
