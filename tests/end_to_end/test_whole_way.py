"""From a folder of scans to a mask over HTTP, by the documented commands: prepare, split, train, evaluate, serve."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from live_stack import running_stack
from typer.testing import CliRunner

from training.cli import app


def passion(*arguments):
    """In this process, which need not import torch for each."""
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_what_the_commands_train_the_service_serves(small_phantoms, small_task_file, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    passion("prepare", small_phantoms, tmp_path / "prepared", "--task", small_task_file, "--workers", 1)
    missing = ("--missing", "t1=0.2,t2=0.5", "--val", 0, "--test", 1)
    passion("split", tmp_path / "prepared", "--out", tmp_path / "split", *missing)
    models = tmp_path / "models"
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {tmp_path}/prepared\nsplit: {tmp_path}/split\nout: {tmp_path}/run\n"
        "name: whole-way\nepochs: 2\nlearning_rate: 1.0e-3\ndevice: cpu\n"
    )
    said = passion("train", config)
    assert "epoch 1:" in said
    checkpoint = tmp_path / "run" / "checkpoint"
    only = tmp_path / "split" / "test.txt"
    subsets = ("--modalities", "t2+flair", "--modalities", "t1")
    said = passion("evaluate", checkpoint, small_phantoms, "--only", only, *subsets, "--device", "cpu")
    assert "1 cases" in said
    models.mkdir()
    checkpoint.rename(models / "whole-way")

    case = small_phantoms / only.read_text().strip()
    scans = {name: case / f"{case.name}_{name}.nii.gz" for name in ("t2", "flair")}
    served = tmp_path / "service"
    served.mkdir()
    with running_stack(served, models) as stack:
        content, job = stack.mask(scans)
    assert job["model"] == "whole-way"
    assert job["expected_dice"]["dice"].keys() == {"WT", "TC", "ET"}
    given = ("--t2", scans["t2"], "--flair", scans["flair"])
    passion("predict", models / "whole-way", *given, "-o", tmp_path / "m.nii.gz")
    ours = nib.load(tmp_path / "m.nii.gz")
    theirs = nib.Nifti1Image.from_bytes(gzip.decompress(content))
    np.testing.assert_array_equal(np.asarray(theirs.dataobj), np.asarray(ours.dataobj))
