"""Several processes, as torchrun starts them: 2 x batch 1 is batch 2, and no end of a process is the end of the run."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from models.checkpoint import Checkpoint
from training.config import TrainConfig
from training.errors import UserError
from training.loader import batches
from training.passion.objective import Terms
from training.ranks import ENVIRONMENT, Ranks, join
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = Path(__file__).parents[1] / "rank_runs.py"
TRAIN = ["-m", "training", "train"]


def settings(small_data, out, **changes):
    data, split = small_data
    return {"data": str(data), "split": str(split), "out": str(out), "device": "cpu", "foreground": 1.0} | changes


def write(path, small_data, **changes):
    path.write_text(yaml.safe_dump(settings(small_data, path.with_suffix(""), **changes)))
    return path


@contextmanager
def torchrun(*command, processes=2):
    """A free port, a session of its own; nothing of it outlives the block."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT} | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*launch, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        yield process
    finally:
        for left in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            left.kill()
        process.wait(timeout=30)


def finish(process, timeout=120):
    output, _ = process.communicate(timeout=timeout)
    return output


def wait_for_epochs(process, out, epochs):
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() or len(log(out)) < epochs:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ranks_of(process):
    """The processes by rank."""
    children = psutil.Process(process.pid).children()
    return sorted((c for c in children if "LOCAL_RANK" in c.environ()), key=lambda c: c.environ()["LOCAL_RANK"])


def log(out):
    lines = (Path(out) / "log.jsonl").read_text().splitlines(keepends=True)
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines if x.endswith("\n")]


def tensors(out, name):
    return load_file(Path(out) / "checkpoint" / name)


def assert_same_run(ours, theirs):
    assert log(ours) == log(theirs)
    for name in ("weights.safetensors", "optimiser.safetensors"):
        a, b = tensors(ours, name), tensors(theirs, name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    states = [json.loads((Path(out) / "checkpoint/resume.json").read_text()) for out in (ours, theirs)]
    assert states[0]["method"] == states[1]["method"]


def flat(record, prefix=""):
    if not isinstance(record, dict):
        return {prefix: record}
    return {key: value for name, inner in record.items() for key, value in flat(inner, f"{prefix}/{name}").items()}


def assert_close_runs(ours, theirs, gradients=True):
    """Every figure of the log, and the gradients, of which AdamW's first moment is a weighted sum."""
    for a, b in zip(log(ours), log(theirs), strict=True):
        assert flat(a) == pytest.approx(flat(b), rel=1e-4, abs=1e-6)
    if not gradients:
        return
    a, b = tensors(ours, "optimiser.safetensors"), tensors(theirs, "optimiser.safetensors")
    moments = [key for key in a if key.endswith("exp_avg")]
    assert moments
    largest = max(b[key].abs().max() for key in moments)
    for key in moments:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5 * largest.item())


# What a rank has of an epoch


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 4))
def test_the_ranks_share_an_epoch_and_do_the_same_number_of_steps(subjects, world, size):
    order = list(range(subjects))[::-1]
    shares = [Ranks(rank, world).share(order, size) for rank in range(world)]
    assert sorted(i for share in shares for i in share) == sorted(order)
    steps = -(-subjects // (world * size))
    for step in range(steps):
        parts = [share[step * size : (step + 1) * size] for share in shares]
        # Together they are what one process with a batch of world * size would have.
        assert [i for part in parts for i in part] == order[step * world * size : (step + 1) * world * size]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(len(share) <= steps * size for share in shares)


# Batches of one step


@pytest.fixture(scope="module")
def three_subjects(small_data, tmp_path_factory):
    """An epoch of two steps of two, of which the last has one subject, and so none for one of two ranks."""
    data, split = small_data
    folder = tmp_path_factory.mktemp("three")
    (folder / "train.txt").write_text("".join((split / "train.txt").read_text().splitlines(keepends=True)[:3]))
    shutil.copy(split / "missingness.csv", folder)
    return data, folder


METHODS = ["passion", "none", "ogm-ge", "pmr", "dwa"]


def slow_learner(method, **changes):
    """Its weights hardly move, so that rounding in the first step does not show in the second."""
    return {"method": method, "epochs": 1, "learning_rate": 1e-7} | changes


@pytest.fixture(scope="module")
def batch_of_two(three_subjects, tmp_path_factory):
    """By method, the folder of a run with batch_size 2 in one process."""
    root = tmp_path_factory.mktemp("batch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for method in METHODS:
        values = settings(three_subjects, root / method, **slow_learner(method, batch_size=2))
        assert Trainer(TrainConfig.model_validate(values)).run()
    torch.set_num_threads(before)
    return root


@pytest.mark.parametrize("method", METHODS)
def test_two_accumulated_batches_are_one_of_two(three_subjects, batch_of_two, tmp_path, method):
    values = settings(three_subjects, tmp_path, **slow_learner(method, accumulate=2))
    assert Trainer(TrainConfig.model_validate(values)).run()
    assert_close_runs(tmp_path, batch_of_two / method)


@pytest.mark.slow
def test_two_processes_with_one_subject_each_are_a_batch_of_two(three_subjects, small_data, batch_of_two, tmp_path):
    paths = [write(tmp_path / f"{method}.yaml", three_subjects, **slow_learner(method)) for method in METHODS]
    # One step an epoch, in which both ranks accumulate, or one alone does.
    accumulated = {"both": small_data, "one": three_subjects}
    for name, data in accumulated.items():
        paths.append(write(tmp_path / f"{name}.yaml", data, **slow_learner("passion", accumulate=2)))
        values = settings(data, tmp_path / f"{name}-batch", **slow_learner("passion", batch_size=4))
        assert Trainer(TrainConfig.model_validate(values)).run()
    with torchrun(RUNS, *paths) as process:
        output = finish(process)
    assert process.returncode == 0, output
    for method in METHODS:
        # OGM-GE's noise is drawn alike on all ranks, and so not from the generator that one process draws from.
        assert_close_runs(tmp_path / method, batch_of_two / method, gradients=method != "ogm-ge")
    for name in accumulated:
        assert_close_runs(tmp_path / name, tmp_path / f"{name}-batch")


def test_modalities_that_lag_are_those_of_all_accumulated_batches(small_data, tmp_path):
    """With dropout: the sums of the pass without gradient are those of the pass with it."""
    values = settings(small_data, tmp_path, backbone="mmformer", accumulate=2, crop=[32, 32, 32])
    trainer = Trainer(TrainConfig.model_validate(values))
    trainer.network.train()
    losses = trainer.step(*itertools.islice(batches(trainer.subjects, 0, 1, 0), 2))
    assert len(losses.fuse) == 2
    assert losses.dist.any()
    torch.testing.assert_close(trainer.state.method._relative.float(), losses.preference(), rtol=1e-3, atol=1e-4)


def test_no_sample_gives_nothing():
    nothing = Terms.empty(3, torch.device("cpu"))
    assert nothing.baseline().item() == 0
    assert nothing.passion(torch.ones(3), torch.ones(3)).item() == 0
    assert not nothing.preference().any()


# Stops, kills and resumes

LONG = {"backbone": "unet", "epochs": 5, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def straight(three_subjects, tmp_path_factory):
    """The folder of a run of two processes that nothing interrupts."""
    path = write(tmp_path_factory.mktemp("straight") / "run.yaml", three_subjects, **LONG)
    with torchrun(RUNS, path) as process:
        output = finish(process)
    assert process.returncode == 0, output
    return path.with_suffix("")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_that_lost_a_rank_resumes_exactly(three_subjects, straight, tmp_path, rank):
    path = write(tmp_path / "run.yaml", three_subjects, **LONG)
    out = path.with_suffix("")
    with torchrun(*TRAIN, path) as process:
        wait_for_epochs(process, out, 2)  # the first is saved then, and the second perhaps about to be
        killed, left = (ranks_of(process)[r] for r in (rank, 1 - rank))
        killed.kill()
        output = finish(process, timeout=60)
        assert not left.is_running()
    assert process.returncode != 0
    assert output.count("error: ") == 1, output
    assert "start again with --resume" in output
    if (out / "checkpoint").exists():  # else it was killed between two renames, which --resume finishes
        assert Checkpoint.load(out / "checkpoint").card.training["epochs_done"] >= 1
    with torchrun(*TRAIN, path, "--resume") as process:
        output = finish(process)
    assert process.returncode == 0, output
    assert output.count("epoch 4:") == 1
    assert_same_run(out, straight)


@pytest.mark.slow
def test_sigterm_stops_all_ranks_after_the_same_step(three_subjects, straight, tmp_path):
    path = write(tmp_path / "run.yaml", three_subjects, **LONG)
    out = path.with_suffix("")
    with torchrun(*TRAIN, path) as process:
        wait_for_epochs(process, out, 1)
        process.send_signal(signal.SIGTERM)
        output = finish(process, timeout=60)
    assert output.count("stopped and saved in epoch") == 1, output
    assert "error: " not in output
    with torchrun(*TRAIN, path, "--resume") as process:
        output = finish(process)
    assert process.returncode == 0, output
    assert_same_run(out, straight)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both(three_subjects, tmp_path):
    path = write(tmp_path / "run.yaml", three_subjects, **LONG | {"epochs": 1000})
    with torchrun(*TRAIN, path) as process:
        wait_for_epochs(process, path.with_suffix(""), 1)
        ranks_of(process)[1].send_signal(signal.SIGTERM)
        output = finish(process, timeout=60)
    assert process.returncode == 0, output  # to torchrun both have ended well
    assert output.count("stopped and saved in epoch") == 1


@pytest.mark.slow
def test_the_same_step_resumes_in_one_process_and_another_is_refused(three_subjects, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    more = LONG | {"epochs": 6}
    with pytest.raises(
        UserError, match="had 2 subjects and now would have 1: make batch_size x accumulate x processes"
    ):
        Trainer(TrainConfig.model_validate(settings(three_subjects, tmp_path / "run", **more)), resume=True)
    values = settings(three_subjects, tmp_path / "run", **more, accumulate=2)
    trainer = Trainer(TrainConfig.model_validate(values), resume=True)
    assert trainer.run()
    assert len(log(tmp_path / "run")) == 6


# What cannot work


@pytest.mark.slow
def test_an_error_of_one_rank_ends_both_is_told_once_and_leaves_the_checkpoint(three_subjects, straight, tmp_path):
    """A subject's scan is damaged while the run rests. Only the rank that draws it sees so."""
    data = tmp_path / "data"
    shutil.copytree(three_subjects[0], data)
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    path = write(tmp_path / "run.yaml", (data, three_subjects[1]), **LONG | {"epochs": 1000})
    (data / (three_subjects[1] / "train.txt").read_text().split()[0] / "seg.npy").write_bytes(b"damaged")
    with torchrun(*TRAIN, path, "--resume") as process:
        output = finish(process, timeout=60)
    assert process.returncode != 0
    assert output.count("error: ") == 1, output
    assert "seg.npy is missing or damaged" in output
    assert Checkpoint.load(out / "checkpoint").card.training["epochs_done"] >= LONG["epochs"]


@pytest.mark.slow
def test_a_device_that_is_not_there_is_refused_at_once_and_once(three_subjects, tmp_path):
    path = write(tmp_path / "run.yaml", three_subjects, device="cuda:63")
    with torchrun(*TRAIN, path) as process:
        output = finish(process, timeout=60)
    assert process.returncode != 0
    assert output.count("error: ") == 1, output
    assert "device 'cuda:63' is not there" in output
    assert not path.with_suffix("").exists()


@pytest.mark.slow
def test_more_processes_than_subjects_are_refused(three_subjects, tmp_path):
    path = write(tmp_path / "run.yaml", three_subjects)
    with torchrun(*TRAIN, path, processes=4) as process:
        output = finish(process, timeout=60)
    assert process.returncode != 0
    assert output.count("3 training subjects for 4 processes: start fewer") == 1, output


def test_half_of_torchruns_environment_is_refused(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    with join() as ranks:
        assert ranks == Ranks()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set: start with torchrun"):
        with join():
            pass
