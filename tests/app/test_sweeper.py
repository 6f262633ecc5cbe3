"""What is removed when, record and files together."""

import os
import time

import pytest

from app.jobs.blobs import BlobStore
from app.jobs.record import InputFile, Job, new_id
from app.jobs.store import JobStore
from app.jobs.sweeper import TURN, Sweeper


@pytest.fixture
def quick(settings):
    return settings.model_copy(update={"retention": 0.2, "cancelled_kept": 5.0, "orphans_kept": 60.0})


@pytest.fixture
def blobs(settings):
    blobs = BlobStore(settings.store)
    blobs.open()
    return blobs


def test_expired_jobs_go_with_their_files_and_files_of_no_job_when_they_are_old(client, quick, blobs):
    store, sweeper = JobStore(client, quick), Sweeper(client, quick, blobs)
    assert sweeper.interval == pytest.approx(0.2 / 3)

    def folder(job_id, accept=True):
        (blobs.incoming(job_id) / "t2.nii.gz").write_bytes(b"x")
        if accept:
            blobs.accept(job_id)
        return job_id

    def record():
        job = Job(id=folder(new_id()), model="m", inputs=(InputFile(modality="t2", filename="t2.nii.gz"),))
        return store.create(job)

    done, waits = record(), record()
    store.succeed(store.begin(done.id, "w"), {}, "")
    orphan, new_orphan, cut_off, comes_in = (folder(new_id(), accept=n < 2) for n in range(4))
    half_deleted = blobs.root / f".deleted-{new_id()}-0123"
    (half_deleted / "input").mkdir(parents=True)
    stranger = blobs.root / "notes"
    stranger.mkdir()
    long_ago = time.time() - 61
    old = [blobs.root / orphan, blobs.root / f".incoming-{cut_off}", half_deleted, stranger, blobs.root / waits.id]
    for path in old:
        os.utime(path, (long_ago, long_ago))
    time.sleep(0.25)
    sweeper.round()
    left = {path.name for path in blobs.root.iterdir()}
    assert left == {waits.id, new_orphan, f".incoming-{comes_in}", "notes"}
    assert not store.exists(done.id)
    assert store.exists(waits.id)


def test_one_round_at_a_time(client, quick, blobs):
    first, second = Sweeper(client, quick, blobs), Sweeper(client, quick, blobs)
    first.round()
    os.rename(blobs.incoming(new_id()).parent, blobs.root / f".deleted-{new_id()}-ab")
    folder = next(blobs.root.iterdir())
    os.utime(folder, (0, 0))
    second.round()
    assert folder.exists()
    client.delete(TURN)
    second.round()
    assert not folder.exists()
