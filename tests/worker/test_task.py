"""One job through the worker's own code, in this process: a real Redis, a real store, a real (small) checkpoint."""

import gzip
import shutil
import signal
import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import tiny_checkpoint
import torch
from celery.exceptions import Reject, SoftTimeLimitExceeded
from own_redis import running
from s3_server import BUCKET, s3_server
from scans import SHAPE, head, image, nifti, read, scan

from app.jobs.blobs import BlobStore
from app.jobs.bucket import Bucket
from app.jobs.bucket_store import BucketStore
from app.jobs.cards import ModelShelf
from app.jobs.connection import connect
from app.jobs.record import InputFile, Job, JobState, new_id
from app.jobs.store import JobOverError, JobStore
from models.checkpoint import Checkpoint
from models.predictor import Predictor
from models.task import Task
from worker.checkpoints import Checkpoints, pick_device
from worker.task import Desk
from worker.task import run as run_by

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def desk(settings, tiny):
    shutil.copytree(tiny, settings.models / "tiny")
    client = connect(settings)
    blobs = BlobStore(settings.store)
    blobs.open()
    shelf = ModelShelf(settings.models)
    jobs, checkpoints = JobStore(client, settings), Checkpoints(shelf, "cpu", settings.overlap, settings.precision)
    yield Desk(settings, jobs, jobs, blobs, checkpoints)
    client.close()


def run(job_id, desk):
    run_by(job_id, desk, "w@here")


def nifti_gz(data):
    return gzip.compress(nifti(image(data)))


def add(desk, model="tiny", **files):
    """A queued job with these files."""
    job_id = new_id()
    folder = desk.blobs.incoming(job_id)
    for name, data in files.items():
        (folder / f"{name}.nii.gz").write_bytes(data)
    desk.blobs.accept(job_id)
    inputs = tuple(InputFile(modality=n, filename=f"{n}.nii.gz") for n in files)
    job = Job(id=job_id, model=model, inputs=inputs)
    desk.jobs.create(job)
    return job


def test_a_job_succeeds_with_the_predictors_own_mask(desk, tiny):
    job = add(desk, t2=scan("t2"), flair=scan("flair"))
    run(job.id, desk)
    done = desk.jobs.get(job.id)
    assert (done.state, done.attempts, done.error) == (JobState.SUCCEEDED, 1, None)
    assert done.weights_sha256 == Checkpoint.load(tiny).card.weights_sha256
    expected = Predictor(Checkpoint.load(tiny)).segment(desk.blobs.inputs(job))
    mask = read(desk.blobs.mask(done).read_bytes())
    assert np.array_equal(np.asarray(mask.dataobj), np.asarray(expected.mask.dataobj))
    assert done.volumes_ml == expected.volumes_ml
    assert set(done.volumes_ml) == {"WT", "TC", "ET"}


def test_the_model_is_loaded_once_and_anew_when_its_weights_change(desk, tiny):
    first = desk.checkpoints.get("tiny")
    assert desk.checkpoints.get("tiny") is first
    tiny_checkpoint.make(desk.settings.models / "tiny", seed=1)
    again = desk.checkpoints.get("tiny")
    assert again[0] != first[0]
    assert again[1] is not first[1]


@pytest.mark.parametrize("end", ["cancelled", "removed", "succeeded"])
def test_a_message_for_a_job_that_is_over_does_nothing(desk, end):
    job = add(desk, t2=scan("t2"))
    if end == "cancelled":
        desk.jobs.cancel(job.id)
    elif end == "removed":
        desk.jobs.remove(job.id)
    else:
        run(job.id, desk)
    mask = desk.blobs.mask(desk.jobs.get(job.id) if end == "succeeded" else job)
    written = mask.stat().st_mtime_ns if mask.exists() else None
    run(job.id, desk)
    assert (mask.stat().st_mtime_ns if mask.exists() else None) == written


def test_images_that_cannot_be_used_fail_with_the_models_words(desk):
    constant_brain = np.zeros((40, 40, 32), np.float32)
    constant_brain[5:30, 5:30, 5:30] = 9
    job = add(desk, t1=nifti_gz(constant_brain))
    run(job.id, desk)
    failed = desk.jobs.get(job.id)
    assert (failed.state, failed.error.title) == (JobState.FAILED, "The images cannot be segmented")
    assert failed.error.detail.startswith("t1: ")
    assert failed.error.reference is None


def test_a_modality_that_is_not_the_models(desk):
    job = add(desk, dwi=scan("dwi"))
    run(job.id, desk)
    assert "'dwi' is no modality" in desk.jobs.get(job.id).error.detail


def test_a_model_that_is_gone(desk):
    job = add(desk, model="gone", t2=scan("t2"))
    run(job.id, desk)
    failed = desk.jobs.get(job.id)
    assert failed.error.title == "The model cannot be used"
    assert "'gone' is no longer served" in failed.error.detail


def test_weights_that_were_changed_and_no_path_of_this_machine(desk):
    weights = desk.settings.models / "tiny" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    job = add(desk, t2=scan("t2"))
    run(job.id, desk)
    failed = desk.jobs.get(job.id)
    assert failed.error.title == "The model cannot be used"
    assert "tiny: weights.safetensors has sha256" in failed.error.detail
    assert str(desk.settings.models) not in failed.error.detail


def test_an_error_of_ours_gives_a_reference_and_no_story(desk, capsys, caplog):
    job = add(desk, t2=scan("t2"))
    output = desk.blobs.mask(job).parent
    output.rmdir()
    output.write_text("a file where a folder should be")
    run(job.id, desk)
    failed = desk.jobs.get(job.id)
    assert failed.state is JobState.FAILED
    assert failed.error.title == "Something went wrong on our side"
    assert failed.error.reference in failed.error.detail
    assert str(desk.settings.store) not in failed.model_dump_json()


def test_a_job_cancelled_while_it_runs_stops_and_leaves_nothing(desk):
    job = add(desk, t2=nifti_gz(head("t2", LONG)))

    def cancel():
        while desk.jobs.get(job.id).stage != "segmenting":
            time.sleep(0.01)
        desk.jobs.cancel(job.id)
        desk.blobs.delete(job.id)

    canceller = threading.Thread(target=cancel)
    began = time.monotonic()
    canceller.start()
    run(job.id, desk)
    canceller.join()
    assert desk.jobs.get(job.id).state is JobState.CANCELLED
    assert list(desk.settings.store.iterdir()) == []
    assert time.monotonic() - began < 30


def test_a_job_deleted_before_its_files_are_read_is_not_an_error(desk, caplog):
    job = add(desk, t2=scan("t2"))
    taken = desk.jobs.begin(job.id, "w@here")
    desk.jobs.cancel(job.id)
    desk.blobs.delete(job.id)
    assert not desk.jobs.owns(taken)
    run(job.id, desk)
    assert desk.jobs.get(job.id).state is JobState.CANCELLED


LONG = (96, 96, 96)
"""A volume that takes some seconds."""


@pytest.fixture
def soon():
    """Raises an exception in the main thread after half a second, as a signal of Celery's does to a task."""

    def arm(error):
        def handler(_number, _frame):
            raise error

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.5)

    before = signal.getsignal(signal.SIGALRM)
    yield arm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_out_of_time(desk, soon):
    job = add(desk, t2=nifti_gz(head("t2", LONG)))
    desk.checkpoints.get("tiny")
    soon(SoftTimeLimitExceeded())
    run(job.id, desk)
    failed = desk.jobs.get(job.id)
    assert failed.state is JobState.FAILED
    assert failed.error.title == "The time limit was reached"


def test_a_worker_told_to_stop_gives_the_job_back(desk, soon):
    job = add(desk, t2=nifti_gz(head("t2", LONG)))
    desk.checkpoints.get("tiny")
    soon(SystemExit())
    with pytest.raises(SystemExit):
        run(job.id, desk)
    back = desk.jobs.get(job.id)
    assert (back.state, back.attempts) == (JobState.QUEUED, 0)
    assert desk.blobs.inputs(job)["t2"].is_file()


def test_a_redis_that_ends_during_a_job_leaves_the_message(desk, tmp_path):
    """With a client that is less patient than the worker's, so as not to wait for minutes."""
    with ExitStack() as stack:
        redis = stack.enter_context(ExitStack())
        url = redis.enter_context(running(tmp_path / "redis"))
        client = connect(desk.settings.model_copy(update={"redis_url": url}))
        stack.callback(client.close)
        jobs = JobStore(client, desk.settings)
        there = Desk(desk.settings, jobs, jobs, desk.blobs, desk.checkpoints)
        job = add(there, t2=nifti_gz(head("t2", LONG)))

        def end_redis():
            while there.jobs.get(job.id).stage != "segmenting":
                time.sleep(0.01)
            redis.close()

        ender = threading.Thread(target=end_redis)
        ender.start()
        with pytest.raises(Reject) as caught:
            run(job.id, there)
        ender.join()
        assert caught.value.requeue
        assert there.blobs.inputs(job)["t2"].is_file()


class Cramped:
    """A network on a device whose memory holds windows of so many voxels along an axis and no larger ones."""

    def __init__(self, network, most):
        self._network = network
        self._most = most

    def encode(self, windows, mask):
        if windows.shape[-1] > self._most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._network.encode(windows, mask)

    def __getattr__(self, name):
        return getattr(self._network, name)


@pytest.mark.parametrize("most", [16, 8])
def test_out_of_memory_is_tried_once_more_in_smaller_windows(desk, monkeypatch, most):
    task = Task.load("glioma")
    task = Task.model_validate(task.model_dump() | {"patch_size": (32,) * 3, "min_crop": 32})
    tiny_checkpoint.make(desk.settings.models / "roomy", task=task)
    _, predictor = desk.checkpoints.get("roomy")
    assert (predictor.window, predictor.leaner().window) == ((32, 32, 32), (16, 16, 16))
    for each in (predictor, smaller := predictor.leaner()):
        monkeypatch.setattr(each, "_network", Cramped(each._network, most))
    monkeypatch.setattr(predictor, "leaner", lambda: smaller)
    job = add(desk, model="roomy", t2=scan("t2"))
    run(job.id, desk)
    done = desk.jobs.get(job.id)
    assert done.attempts == 1
    if most == 16:
        assert done.state is JobState.SUCCEEDED
        assert "windows of 16 x 16 x 16 voxels" in done.warnings[0]
    else:
        assert (done.state, done.error.kind) == (JobState.FAILED, "out-of-memory")
        assert not list(desk.blobs.mask(done).parent.iterdir())


@pytest.mark.parametrize("backbone", ["mmformer", "m2ftrans"])
def test_networks_whose_windows_are_fixed_get_by_with_one_at_a_time(tiny, backbone):
    checkpoint = Checkpoint.load(tiny)
    checkpoint = replace(checkpoint, card=checkpoint.card.model_copy(update={"backbone": backbone}))
    assert Predictor(checkpoint).leaner().window == checkpoint.card.task.patch_size


def test_a_job_started_too_often_is_given_up(desk):
    job = add(desk, t2=scan("t2"))
    for _ in range(desk.settings.max_attempts):
        desk.jobs.begin(job.id, "w@here")
        desk.jobs.process_ended(job.id, "w@here")
    run(job.id, desk)
    assert desk.jobs.get(job.id).error.title == "The worker was lost"


def test_a_run_that_was_overtaken_writes_no_result(desk):
    """Two processes on one job, as after a lost connection: one result is kept, and the loser does not delete it."""
    job = add(desk, t2=scan("t2"))
    slow = desk.jobs.begin(job.id, "w@here")
    desk.jobs.process_ended(job.id, "w@here")
    run(job.id, desk)
    done = desk.jobs.get(job.id)
    assert done.attempts == 2
    desk.blobs.mask(slow).write_bytes(b"what the slow one found")
    with pytest.raises(JobOverError):
        desk.jobs.succeed(slow, {}, "")
    assert read(desk.blobs.mask(done).read_bytes()).shape == SHAPE


class Slow(Checkpoints):
    """Takes so long to load a model that `meanwhile` happens."""

    meanwhile = staticmethod(lambda: None)

    def get(self, name):
        self.meanwhile()
        return super().get(name)


def test_a_run_that_lost_its_job_leaves_the_bench_to_its_successor(desk):
    with s3_server():
        blobs = BucketStore(desk.blobs, Bucket(f"s3://{BUCKET}/jobs"), benched=3600)
        slow = Slow(ModelShelf(desk.settings.models), "cpu", desk.settings.overlap, desk.settings.precision)
        desk = replace(desk, blobs=blobs, checkpoints=slow)
        job = add(desk, t2=scan("t2"))
        bench = desk.settings.store / job.id
        assert not bench.exists()

        def lose():
            desk.jobs.process_ended(job.id, "w@here")
            assert desk.jobs.begin(job.id, "other@here").attempts == 2

        slow.meanwhile = lose
        run(job.id, desk)
        assert desk.jobs.get(job.id).worker == "other@here"
        assert [path.name for path in (bench / "input").iterdir()] == ["t2.nii.gz"]

        desk.jobs.process_ended(job.id, "other@here")
        slow.meanwhile = lambda: None
        run(job.id, desk)
        assert desk.jobs.get(job.id).state is JobState.SUCCEEDED
        assert not bench.exists()


def test_a_message_for_a_job_in_live_hands_does_nothing(desk):
    job = add(desk, t2=scan("t2"))
    held = desk.jobs.begin(job.id, "other@there")
    run(job.id, desk)
    assert desk.jobs.get(job.id) == held


@pytest.mark.parametrize(("wanted", "picked"), [("cpu", "cpu"), ("cuda:3", "cuda:3"), ("cuda", "cuda:0")])
def test_the_device(wanted, picked):
    assert pick_device(wanted) == picked


def test_auto_takes_what_there_is():
    assert pick_device("auto") == ("cuda:0" if torch.cuda.is_available() else "cpu")
