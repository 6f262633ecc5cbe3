"""`passion import`, as a user runs it: weights in the published layout become a checkpoint, and nothing else does."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from golden_case import GOLDEN, fill_weights, load_case
from safetensors.torch import save_file
from typer.testing import CliRunner

from models.backbones import BACKBONES, build
from models.checkpoint import Checkpoint
from models.task import Task
from training.cli import app
from training.errors import UserError

PUBLISHED = sorted(set(BACKBONES) & {"rfnet", "mmformer", "m2ftrans"})
RUNNER = CliRunner()


def run(*arguments):
    return RUNNER.invoke(app, ["import", *map(str, arguments)])


def refused(*arguments):
    result = run(*arguments)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


class Golden(torch.nn.Module):
    """The tensors of a keys file, filled by the golden rule; none of our networks has a part in it."""

    def __init__(self, backbone):
        super().__init__()
        shapes = json.loads((GOLDEN / "networks" / f"{backbone}_32_keys.json").read_text())
        self.tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
        fill_weights(self)

    def state_dict(self):
        return self.tensors


@pytest.fixture(scope="module")
def weights():
    return Golden("rfnet").tensors


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_imported_weights_give_the_golden_probabilities(backbone, tmp_path):
    file, out = tmp_path / "model_last.pth", tmp_path / "model"
    published = {f"module.{name}": tensor for name, tensor in Golden(backbone).tensors.items()}
    optimiser = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
    torch.save({"epoch": 299, "state_dict": published, "optim_dict": optimiser}, file)
    rates = "t1=0.2,t1c=0.4,flair=0.6,t2=0.8"
    result = run(file, "--backbone", backbone, "--crop", 32, "--missing", rates, out)
    assert result.exit_code == 0, result.exception
    assert f"{backbone} of width 8" in result.output

    loaded = Checkpoint.load(out)
    assert loaded.card.name == "model"
    assert loaded.card.missing_rates == {"flair": 0.6, "t1ce": 0.4, "t1": 0.2, "t2": 0.8}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert loaded.card.training == {"imported_from": {"file": "model_last.pth", "sha256": digest}}
    for name in (f"{backbone}_32_11", f"{backbone}_32_12"):
        case = load_case(name)
        with torch.no_grad():
            for x, mask, want in zip(case.x.split(1), case.masks, case.prob, strict=True):
                fused = loaded.network.fuse(loaded.network.encode(x, mask), mask)
                s = case.stride
                got = fused.logits.softmax(1)[0, :, ::s, ::s, ::s]
                np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=5e-5)


@pytest.mark.parametrize("wrapped", ["bare", "model", "twice", "half", "safetensors"])
def test_the_ways_to_keep_a_state_dict(wrapped, weights, tmp_path):
    file = tmp_path / ("w.safetensors" if wrapped == "safetensors" else "w.pth")
    if wrapped == "safetensors":
        save_file({f"module.{name}": tensor for name, tensor in weights.items()}, file)
    else:
        content = {
            "bare": weights,
            "model": {"model": weights},
            "twice": {"state_dict": {"network": weights}, "epoch": 3},
            "half": {name: tensor.half() for name, tensor in weights.items()},
        }
        torch.save(content[wrapped], file)
    result = run(file, "--backbone", "rfnet", tmp_path / "out", "--name", "published", "--regime", "pdt")
    assert result.exit_code == 0, result.exception
    loaded = Checkpoint.load(tmp_path / "out")
    got = loaded.network.state_dict()
    assert all(tensor.dtype is torch.float32 for tensor in got.values())
    want = {name: tensor.half().float() if wrapped == "half" else tensor for name, tensor in weights.items()}
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert loaded.card.name == "published"
    assert loaded.card.task.patch_size == (80, 80, 80)
    assert loaded.card.missing_rates == dict.fromkeys(loaded.card.task.names, 0.0)


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mknod, (str(self.path),))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_is_never_run(weights, tmp_path, legacy):
    bait = tmp_path / "bait"
    torch.save(
        {"state_dict": weights, "note": Touch(bait)}, tmp_path / "evil.pth", _use_new_zipfile_serialization=not legacy
    )
    command = [sys.executable, "-m", "training", "import", "evil.pth", "--backbone", "rfnet", "out"]
    # Not even where the user has told torch to trust every file.
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "evil.pth: holds more than tensors (posix.mknod)" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["evil.pth"]
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert bait.exists()  # the bait was a live one


def test_every_name_that_does_not_fit_is_listed_and_nothing_is_written(weights, tmp_path):
    changed = dict(weights)
    del changed["decoder_fuse.seg_layer.bias"]
    changed["decoder_fuse.extra\x1b[2J"] = torch.zeros(3)
    changed["t2_encoder.e1_c1.conv.weight"] = torch.zeros(8, 1, 3, 3)
    torch.save(changed, tmp_path / "w.pth")
    message = refused(tmp_path / "w.pth", "--backbone", "rfnet", tmp_path / "out")
    first, *names = message.splitlines()
    assert "1 names missing, 1 unexpected, 1 of another shape" in first
    assert names == [
        "  missing: decoder_fuse.seg_layer.bias (4,)",
        "  unexpected: 'decoder_fuse.extra\\x1b[2J' (3,)",
        "  another shape: t2_encoder.e1_c1.conv.weight (8, 1, 3, 3), the network has (8, 1, 3, 3, 3)",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]


@pytest.mark.parametrize("backbone", sorted({"mmformer", "m2ftrans"} & set(BACKBONES)))
def test_position_embeddings_tell_the_crop(backbone, tmp_path):
    task = Task.load("glioma").model_copy(update={"patch_size": (48, 48, 48)})
    torch.save(build(backbone, task, 8).state_dict(), tmp_path / "w.pth")
    message = refused(tmp_path / "w.pth", "--backbone", backbone, tmp_path / "out")
    assert "crops of 48x48x48 voxels: give --crop 48" in message.splitlines()[0]
    assert not (tmp_path / "out").exists()


def test_the_names_of_another_backbone_are_known(weights, tmp_path):
    torch.save(weights, tmp_path / "w.pth")
    message = refused(tmp_path / "w.pth", "--backbone", "mmformer", tmp_path / "out")
    assert "the names are those of rfnet: give --backbone rfnet" in message.splitlines()[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.fill_(float("nan")), "not finite numbers (NaN or infinite): decoder_fuse.seg_layer.bias"),
        (lambda t: t.int(), "not plain floating point numbers: decoder_fuse.seg_layer.bias"),
        (lambda t: t.to_sparse(), "not plain floating point numbers: decoder_fuse.seg_layer.bias"),
        (lambda t: t.to("meta"), "not plain floating point numbers: decoder_fuse.seg_layer.bias"),
        (lambda _t: "a bias", "not only tensors in the state dict: decoder_fuse.seg_layer.bias"),
    ],
)
def test_what_is_no_weight_is_refused_by_name(change, message, weights, tmp_path):
    name = "decoder_fuse.seg_layer.bias"
    torch.save(weights | {name: change(weights[name].clone())}, tmp_path / "w.pth")
    assert message in refused(tmp_path / "w.pth", "--backbone", "rfnet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _recursive():
    content = {}
    content["model"] = content
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole file"),
        (b"PK\x03\x04 and no more", "not a whole file"),
        ({"epoch": 3, "weights": {}}, "no state dict in it, nor one under state_dict, model, "),
        ([torch.zeros(2)], "it is a list"),
        (_recursive(), "no state dict in it"),
        ({"best": np.float64(0.5)}, "holds more than tensors (numpy"),
    ],
)
def test_what_is_no_state_dict_is_refused(content, message, tmp_path):
    file = tmp_path / "w.pth"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    got = refused(file, "--backbone", "rfnet", tmp_path / "out")
    assert str(file) in got
    assert message in got
    assert len(got.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.pth", "out"), "nowhere.pth: no such file"),
        ((".", "out"), "a folder, not a file of weights"),
        (("w.pth", "there"), "there exists"),
        (("w.pth", "out", "--backbone", "resnet"), "no backbone 'resnet': choose one of rfnet"),
        (("w.pth", "out", "--width", "12"), "width 12 must be a multiple of 8"),
        (("w.pth", "out", "--width", "16"), "choose the --width"),
        (("w.pth", "out", "--task", "brain"), "no task 'brain'"),
        (("w.pth", "out", "--crop", "20"), "use multiples of 8"),
        (("w.pth", "out", "--crop", "4"), "--crop 4"),
        (("w.pth", "out", "--crop", "80,80"), "write one whole number of voxels or three"),
        (("w.pth", "out", "--regime", "full"), "no regime 'full': choose one of idt, idt_drop, pdt"),
        (("w.pth", "out", "--method", "magic"), "no method 'magic'"),
        (("w.pth", "out", "--missing", "dwi=0.2"), "--missing: 'dwi' is no modality"),
        (("w.pth", "out", "--missing", "t1=1"), "--missing t1=1: must be at least 0 and below 1"),
    ],
)
def test_bad_requests_are_refused_and_nothing_is_written(arguments, message, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(weights, "w.pth")
    (tmp_path / "there").mkdir()
    assert message in refused("--backbone", "rfnet", *arguments).splitlines()[0]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["there", "w.pth"]
