"""A Redis behind Sentinels: records and queue go to the master, whichever that is."""

import subprocess
from contextlib import contextmanager, suppress

import pytest
import redis
from pydantic import ValidationError

from app.jobs.connection import connect
from app.jobs.queue import JobQueue
from app.jobs.record import InputFile, Job, new_id
from app.jobs.settings import Settings
from app.jobs.store import JobStore
from app.redis_server import find_executable, free_port
from benchmarks.parts import until


@contextmanager
def started(folder, lines, *arguments):
    folder.mkdir()
    path = folder / "redis.conf"
    path.write_text("\n".join(["bind 127.0.0.1", f'dir "{folder}"', 'save ""', *lines]) + "\n")
    process = subprocess.Popen([find_executable(), str(path), *arguments], stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def answered(condition):
    """Until it holds; meanwhile there may be no answer. A Sentinel looks at what it watches once in ten seconds."""

    def holds():
        with suppress(redis.RedisError, OSError):
            return condition()

    until(holds)


@pytest.mark.slow
def test_the_master_is_followed(tmp_path):
    master, replica, sentinel = free_port(), free_port(), free_port()
    account = ["requirepass secret", "masterauth secret"]
    watch = [
        f"port {sentinel}",
        f"sentinel monitor passion 127.0.0.1 {master} 1",
        "sentinel auth-pass passion secret",
        "sentinel down-after-milliseconds passion 500",
    ]
    settings = Settings(redis_url=f"sentinel://:secret@127.0.0.1:{sentinel}/2", redis_master="passion")
    with (
        started(tmp_path / "a", [f"port {master}", *account]) as old,
        started(tmp_path / "b", [f"port {replica}", f"replicaof 127.0.0.1 {master}", *account]),
        started(tmp_path / "s", watch, "--sentinel"),
    ):
        guard = redis.Redis(port=sentinel, decode_responses=True)
        # Until the Sentinel has asked the master for its replicas, it knows of none.
        answered(lambda: [one["master-link-status"] for one in guard.sentinel_slaves("passion")] == ["ok"])
        client, queue = connect(settings), JobQueue(settings)
        store = JobStore(client, settings)

        def send():
            job = Job(id=new_id(), model="m", inputs=(InputFile(modality="t2", filename="t2.nii.gz"),))
            store.create(job)
            queue.submit(job)
            return job

        first = send()
        assert queue.message_ids(client, [first]) == {first.id}
        assert client.connection_pool.connection_kwargs["db"] == 2
        answered(lambda: redis.Redis(port=replica, db=2, password="secret").llen("passion.any.m") == 1)
        old.kill()
        answered(lambda: guard.sentinel_get_master_addr_by_name("passion")[1] == replica)
        answered(lambda: store.get(first.id) == first)
        second = send()
        assert queue.message_ids(client, [first]) == {first.id, second.id}
        assert redis.Redis(port=replica, db=2, password="secret").exists(f"passion:job:{second.id}")
        queue.close()
        client.close()
        guard.close()


@pytest.mark.parametrize("url", ["sentinel://a;redis://b", "http://a", "a:6379"])
def test_addresses_that_are_none(url):
    with pytest.raises(ValidationError, match="PASSION_REDIS_URL must be"):
        Settings(redis_url=url)
