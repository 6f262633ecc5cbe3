"""Training on four small phantoms: it learns, stops and resumes exactly, and refuses what cannot work."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from models.checkpoint import Checkpoint
from models.predictor import Predictor
from training.config import TrainConfig
from training.errors import UserError
from training.loader import batches
from training.passion.objective import terms
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def config(small_data, out, **changes):
    data, split = small_data
    settings = {"data": data, "split": split, "out": out, "epochs": 2, "learning_rate": 1e-3, "device": "cpu"}
    return TrainConfig.model_validate(settings | changes)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_training_lowers_the_loss_and_its_checkpoint_segments(small_data, small_phantoms, tmp_path):
    trainer = Trainer(config(small_data, tmp_path, epochs=16, foreground=1.0, learning_rate=3e-3))
    crops = list(batches(trainer.subjects, epoch=999, batch_size=1, workers=0))

    def loss():
        with torch.no_grad():
            return sum(terms(trainer.network, b.x, b.labels, b.masks, 4, distil=False).fuse.item() for b in crops)

    before = loss()
    assert trainer.run()
    assert loss() < 0.95 * before
    records = log(tmp_path)
    assert [r["epoch"] for r in records] == list(range(16))
    assert records[-1]["lr"] < records[0]["lr"]
    assert any((tmp_path / "tensorboard").iterdir())

    checkpoint = Checkpoint.load(tmp_path / "checkpoint")
    assert checkpoint.card.training["epochs_done"] == 16
    assert checkpoint.card.missing_rates == {"flair": 0.5, "t1ce": 0.25, "t1": 0.25, "t2": 0.5}
    case = next(iter(sorted(small_phantoms.iterdir())))
    result = Predictor(checkpoint).segment({"flair": case / f"{case.name}_flair.nii.gz"})
    assert result.classes.shape == (40, 40, 26)


def test_a_run_stopped_by_sigterm_in_mid_epoch_resumes_exactly(small_data, tmp_path):
    straight = Trainer(config(small_data, tmp_path / "straight"))
    assert straight.run()

    def stop(report):
        if (report.epoch, report.step) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    assert not Trainer(config(small_data, tmp_path / "stopped")).run(stop)
    resumed = Trainer(config(small_data, tmp_path / "stopped"), resume=True)
    assert (resumed.state.epoch, resumed.state.step) == (1, 2)
    assert resumed.run()

    for name in ("weights.safetensors", "optimiser.safetensors"):
        ours, theirs = (load_file(tmp_path / run / "checkpoint" / name) for run in ("stopped", "straight"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    without_time = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in log(tmp_path / run)] for run in ("stopped", "straight")
    ]
    assert without_time[0] == without_time[1]


def test_crops_do_not_depend_on_the_number_of_workers(small_data, tmp_path):
    subjects = Trainer(config(small_data, tmp_path)).subjects
    here = list(batches(subjects, epoch=3, batch_size=2, workers=0))
    there = list(batches(subjects, epoch=3, batch_size=2, workers=2))
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.labels, b.labels)
        assert a.masks == b.masks
    other = next(iter(batches(subjects, epoch=4, batch_size=2, workers=0)))
    assert not torch.equal(other.x, here[0].x)


def test_a_missing_modality_is_never_read_and_its_encoder_still_decays(small_data, tmp_path):
    trainer = Trainer(config(small_data, tmp_path, weight_decay=0.1))
    batch = next(b for b in batches(trainer.subjects, 0, 1, 0) if b.masks[0] == (False, True, False, False))
    assert not batch.x[0, [0, 2, 3]].any()
    before = {n: p.detach().clone() for n, p in trainer.network.named_parameters()}
    trainer.step(batch)
    weight = dict(trainer.network.named_parameters())["t2_encoder.e1_c1.conv.weight"]
    assert not weight.grad.any()
    torch.testing.assert_close(weight, before["t2_encoder.e1_c1.conv.weight"] * (1 - 1e-3 * 0.1))
    trainer.step(batch)  # with a NaN in an absent modality nothing changes either
    batch.x[0, 0] = float("nan")
    trainer.step(batch)
    assert all(torch.isfinite(p).all() for p in trainer.network.parameters())


def test_without_passion_no_student_runs(small_data, tmp_path):
    trainer = Trainer(config(small_data, tmp_path, method="none"))
    losses = trainer.step(next(batches(trainer.subjects, 0, 1, 0)))
    assert not losses.kl.any()
    assert not losses.proto.any()
    assert losses.sep.any()


def test_warm_up_trains_the_separate_paths_only(small_data, tmp_path):
    trainer = Trainer(config(small_data, tmp_path, warmup_epochs=1))
    trainer.step(next(batches(trainer.subjects, 0, 1, 0)))
    grads = {n: p.grad for n, p in trainer.network.named_parameters()}
    assert not any(g.any() for n, g in grads.items() if n.startswith("decoder_fuse"))
    assert grads["decoder_sep.seg_layer.weight"].any()


def test_a_diverged_loss_stops_the_run_with_a_remedy(small_data, tmp_path):
    trainer = Trainer(config(small_data, tmp_path))
    batch = next(batches(trainer.subjects, 0, 1, 0))
    batch.x[:] = float("inf")
    with pytest.raises(UserError, match="lower learning_rate"):
        trainer.step(batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": [20, 16, 16]}, "multiples of 8"),
        ({"device": "cuda:7"}, "is not there"),
        ({"device": "abacus"}, "unknown"),
        ({"data": "/nowhere"}, "passion prepare"),
        ({"split": "/nowhere"}, "passion split"),
    ],
)
def test_what_cannot_work_is_refused_before_any_step(small_data, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        Trainer(config(small_data, tmp_path, **changes))


def test_a_modality_that_nobody_has_is_refused(small_data, tmp_path):
    data, split = small_data
    (tmp_path / "train.txt").write_text((split / "train.txt").read_text())
    text = (split / "missingness.csv").read_text()
    header, *rows = text.splitlines()
    names = [row.split(",")[0] for row in rows]
    lines = [f'{n},2,"[False, False, True, False]",[2]' for n in names]
    (tmp_path / "missingness.csv").write_text("\n".join([header, *lines]) + "\n")
    with pytest.raises(UserError, match="no training subject has flair, t1ce, t2"):
        Trainer(config((data, tmp_path), tmp_path / "run"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: a\nsplit: b\nout: c\nepoch: 3\n", "unknown key 'epoch'"),
        ("data: a\nsplit: b\n", "out: Field required"),
        ("data: a\nsplit: b\nout: c\nepochs: many\n", "epochs: Input should be a valid integer"),
        ("data: [\n", "not valid YAML"),
        ("- 1\n", "key: value"),
        ("data: a\nsplit: b\nout: c\nepochs: 2\nwarmup_epochs: 2\n", "warmup_epochs: 2 leaves no epoch"),
        ("data: a\nsplit: b\nout: c\nmethod: magic\n", "method: 'magic' is unknown; choose one of none, passion"),
        ("data: a\nsplit: b\nout: c\nbackbone: vgg\n", "backbone: 'vgg' is unknown; choose one of rfnet"),
        ("data: a\nsplit: b\nout: c\ncrop: [30, 32, 32]\n", "crop: rfnet needs multiples of 8, at least 16, not"),
    ],
)
def test_a_bad_configuration_names_file_and_field(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        TrainConfig.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_existing_run_is_neither_overwritten_nor_resumed_with_other_settings(small_data, tmp_path):
    Trainer(config(small_data, tmp_path, epochs=1)).run()
    with pytest.raises(UserError, match="--resume"):
        Trainer(config(small_data, tmp_path))
    with pytest.raises(UserError, match="another seed"):
        Trainer(config(small_data, tmp_path, seed=1), resume=True)
    with pytest.raises(UserError, match="nothing to resume"):
        Trainer(config(small_data, tmp_path / "fresh"), resume=True)


@pytest.mark.slow
def test_the_command_stops_cleanly_on_sigterm(small_data, tmp_path):
    data, split = small_data
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {data}\nsplit: {split}\nout: {tmp_path}/run\nepochs: 1000\ndevice: cpu\n")
    command = [sys.executable, "-m", "training", "train", str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "log.jsonl").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "--resume" in output
    Checkpoint.load(tmp_path / "run" / "checkpoint")
