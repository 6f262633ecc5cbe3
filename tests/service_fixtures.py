"""Fixtures that the tests of the service and of the worker share."""

import pytest
import tiny_checkpoint
from own_redis import running

from app.jobs.connection import connect
from app.jobs.settings import Settings


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory):
    with running(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a small checkpoint."""
    return tiny_checkpoint.make(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture
def settings(redis_url, tmp_path, monkeypatch):
    """Settings of an empty Redis, an empty store and no models; nothing of the environment's."""
    for name in ("REDIS_URL", "PASSION_REDIS_URL", "PASSION_STORE", "PASSION_MODELS"):
        monkeypatch.delenv(name, raising=False)
    client = connect(Settings(redis_url=redis_url))
    client.flushdb()
    client.close()
    return Settings(redis_url=redis_url, store=tmp_path / "store", models=tmp_path / "models")


@pytest.fixture
def client(settings):
    """A Redis client of those settings."""
    client = connect(settings)
    yield client
    client.close()
