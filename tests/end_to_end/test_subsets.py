"""What comes back over HTTP is what `passion predict` writes."""

import subprocess
import sys
from itertools import combinations

import nibabel as nib
import numpy as np
import pytest
import torch
from scans import SMALL, read, write
from typer.testing import CliRunner

from models.checkpoint import Checkpoint
from training.cli import app as passion

NAMES = ("flair", "t1ce", "t1", "t2")
SUBSETS = [s for n in range(1, 5) for s in combinations(NAMES, n)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write(tmp_path_factory.mktemp("patient"), NAMES, shape=SMALL)


pytestmark = pytest.mark.usefixtures("one_thread")


def arguments(models, files, subset, out):
    scans = [part for name in subset for part in (f"--{name}", str(files[name]))]
    return ["predict", str(models / "tiny"), *scans, "-o", str(out), "--device", "cpu"]


def assert_same(served: bytes, predicted):
    got, expected = read(served), nib.load(predicted)
    assert got.get_data_dtype() == expected.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(got.dataobj), np.asarray(expected.dataobj))
    assert got.header.binaryblock == expected.header.binaryblock


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_every_subset_gives_the_mask_of_passion_predict(stack, models, files, tmp_path, subset):
    out = tmp_path / "mask.nii.gz"
    done = CliRunner().invoke(passion, arguments(models, files, subset, out), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    mask, job = stack.mask({name: files[name] for name in subset})
    assert_same(mask, out)
    assert job["modalities"] == {"given": list(subset), "missing": [n for n in NAMES if n not in subset]}
    classes = np.asarray(read(mask).dataobj)
    assert job["volumes_ml"]["WT"] == pytest.approx(np.count_nonzero(classes) / 1000)
    assert classes.any(), "an empty mask would make this test say nothing"


def test_subsets_differ(stack, files):
    """Were the service to ignore a file, two subsets would give one mask."""
    masks = {stack.mask({name: files[name] for name in subset})[0] for subset in SUBSETS[:4]}
    assert len(masks) == 4


def test_the_commands_themselves(stack, models, files, tmp_path):
    """`passion predict` and `passion-server segment`, both as processes, the second with aliases."""
    subset = ("t2", "flair")
    predicted, served = tmp_path / "predicted.nii.gz", tmp_path / "served.nii.gz"
    one = [sys.executable, "-m", "training", *arguments(models, files, subset, predicted)]
    two = [sys.executable, "-m", "app.cli", "segment", "--url", stack.url, "-o", str(served)]
    two += ["--image", f"t2w={files['t2']}", "--flair", str(files["flair"])]
    for command in (one, two):
        subprocess.run(command, check=True, timeout=120, capture_output=True)
    assert_same(served.read_bytes(), predicted)


@pytest.mark.parametrize("subset", [("flair",), ("t1", "t2")], ids="+".join)
def test_what_an_absent_modality_holds_changes_nothing(models, subset):
    """Zeros, noise or NaN in the place of a missing modality: the network's answer is the same to the last bit."""
    checkpoint = Checkpoint.load(models / "tiny")
    task = checkpoint.card.task
    mask = task.mask(subset)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, len(mask), 16, 16, 16, generator=generator)
    answers = []
    for filling in (
        torch.zeros_like(x),
        1e3 * torch.randn(x.shape, generator=generator),
        torch.full_like(x, torch.nan),
    ):
        there = torch.tensor(mask)[None, :, None, None, None]
        with torch.inference_mode():
            full = torch.where(there, x, filling)
            answers.append(checkpoint.network.fuse(checkpoint.network.encode(full, mask), mask).logits)
    assert torch.isfinite(answers[0]).all()
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_the_order_of_the_files_decides_the_grid_and_nothing_else(stack, files):
    one, _ = stack.mask({name: files[name] for name in ("flair", "t2")})
    two, _ = stack.mask({name: files[name] for name in ("t2", "flair")})
    assert np.array_equal(np.asarray(read(one).dataobj), np.asarray(read(two).dataobj))
