"""A store without room: a file system of a few megabytes, in a mount namespace of the stack's own."""

import os
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from live_stack import running_stack
from own_redis import running
from scans import SMALL, image, nifti_gz, scan

SIZE = 12 << 20
LEFT = 1 << 20
"""Bytes that the filler leaves: enough for a record's folders, too few for the scan."""


@pytest.fixture
def stack(tmp_path, models):
    (tmp_path / "store").mkdir()
    mount = f'mount -t tmpfs -o size={SIZE} tmpfs {tmp_path / "store"} && exec "$@"'
    own_namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    with (
        running(tmp_path / "redis") as url,
        running_stack(tmp_path, models, within=own_namespace, REDIS_URL=url) as stack,
    ):
        stack.store = Path(f"/proc/{stack.process.pid}/root{stack.store}")
        yield stack


@pytest.mark.slow
def test_a_full_store_refuses_uploads_fails_jobs_with_the_reason_and_recovers(stack):
    noise = np.random.default_rng(0).standard_normal((80, 80, 120)).astype(np.float32)
    large, small = nifti_gz(image(noise)), scan("t2", SMALL)
    assert LEFT < len(large) < SIZE
    assert stack.finished(stack.post({"t2": small}).json())["state"] == "succeeded"
    (done,) = stack.on_store()

    filler = stack.store / "filler"
    assert room(stack) < SIZE, "the stack has no store of its own"
    filler.write_bytes(bytes(room(stack) - LEFT))
    refused = stack.post({"t2": large})
    assert (refused.status_code, refused.json()["type"]) == (507, "/problems/store-full")
    assert stack.on_store() == sorted([done, "filler"]), "a half-written upload stays"

    worker, _ = stack.children()
    os.killpg(worker.pid, signal.SIGSTOP)
    try:
        job = stack.post({"t2": small}).json()
        fill(filler)
    finally:
        os.killpg(worker.pid, signal.SIGCONT)
    failed = stack.finished(job)
    assert (failed["state"], failed["error"]["kind"]) == ("failed", "store-full")
    assert list((stack.store / job["id"] / "output").iterdir()) == []

    filler.unlink()
    assert stack.finished(stack.post({"t2": small}).json())["state"] == "succeeded"
    assert stack.post({"t2": large}).status_code == 202


def fill(path):
    """Until not a byte more goes on its file system."""
    with path.open("ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 12)):
            pass


def room(stack):
    free = os.statvfs(stack.store)
    return free.f_bavail * free.f_frsize
