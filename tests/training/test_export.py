"""`passion export`: a graph that another runtime runs to the same probabilities, or no file."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from golden_case import fill_weights
from typer.testing import CliRunner

from models.backbone import Fused
from models.backbones import BACKBONES, build
from models.card import Card
from models.checkpoint import Checkpoint, save_checkpoint
from models.task import Task
from training import window_graph
from training.cli import app
from training.errors import UserError

RUNNER = CliRunner()


def run(*arguments):
    return RUNNER.invoke(app, ["export", *map(str, arguments)])


def card(backbone, patch, names=("flair", "t1ce", "t1", "t2")):
    whole = Task.load("glioma").model_dump()
    modalities = [modality for modality in whole["modalities"] if modality["name"] in names]
    task = Task.model_validate(whole | {"modalities": modalities, "patch_size": (patch,) * 3})
    rates = dict.fromkeys(task.names, 0.0)
    return Card(name=backbone, task=task, backbone=backbone, width=8, regime="pdt", method="none", missing_rates=rates)


@pytest.fixture(scope="module", params=sorted(BACKBONES))
def checkpoint(request, tmp_path_factory):
    """Every backbone, at the smallest patch that it takes and for three modalities (a fourth is written in the same
    way, and makes the graph larger by more than a third), with weights that make sharp probabilities."""
    made = card(request.param, 2 * BACKBONES[request.param].divisor, ("flair", "t1", "t2"))
    network = build(made.backbone, made.task, made.width)
    fill_weights(network)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    save_checkpoint(folder, made, network)
    return folder


def expected(folder, present):
    """Random input for the modalities `present`, and the network's probabilities for it."""
    loaded = Checkpoint.load(folder)
    patch = loaded.card.task.patch_size
    mask = loaded.card.task.mask(present)
    # Of the missing ones, nothing may reach the result.
    full = torch.full((1, len(mask), *patch), float("nan"))
    given = [k for k, there in enumerate(mask) if there]
    full[:, given] = torch.randn((1, len(given), *patch), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        probabilities = loaded.network.fuse(loaded.network.encode(full, mask), mask).logits.softmax(1)
    assert probabilities.std() > 0.01
    return full[:, given].contiguous(), probabilities.numpy()


def check_notes(card_json, graph_json, folder, present):
    assert json.loads(card_json) == json.loads((folder / "card.json").read_text())
    graph = json.loads(graph_json)
    patch = json.loads(card_json)["task"]["patch_size"]
    assert graph["modalities"] == present
    assert graph["patch_size"] == patch
    assert graph["input"] == {"name": "x", "type": "float32", "shape": [1, len(present), *patch]}
    assert graph["output"] == {"name": "probabilities", "type": "float32", "shape": [1, 4, *patch]}
    assert graph["labels"] == ["background", "necrotic core", "oedema", "enhancing tumour"]


@pytest.mark.slow
def test_torchscript_gives_the_networks_probabilities(checkpoint, tmp_path):
    file, present = tmp_path / "graph.pt", ["flair", "t2"]
    # An alias, and another order than the task's.
    result = run(checkpoint, "--format", "torchscript", "-o", file, "--modalities", "t2w+flair")
    assert result.exit_code == 0, result.exception
    assert "flair+t2, window of" in result.output
    assert "largest difference from the network" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["graph.pt"]

    notes = {"card.json": "", "graph.json": ""}
    graph = torch.jit.load(file, _extra_files=notes)
    check_notes(notes["card.json"], notes["graph.json"], checkpoint, present)
    x, want = expected(checkpoint, present)
    got = graph(x)
    assert not got.requires_grad
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-4)


def test_a_graph_is_for_all_modalities_unless_told(small_checkpoint, tmp_path):
    result = run(small_checkpoint, "--format", "torchscript", "-o", tmp_path / "graph.pt")
    assert result.exit_code == 0, result.exception
    present = ["flair", "t1ce", "t1", "t2"]
    x, want = expected(small_checkpoint, present)
    np.testing.assert_allclose(torch.jit.load(tmp_path / "graph.pt")(x).numpy(), want, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_onnx_gives_the_networks_probabilities(checkpoint, tmp_path):
    import onnxruntime

    file = tmp_path / "graph.onnx"
    result = run(checkpoint, "--format", "onnx", "-o", file, "--modalities", "t2w+flair")
    assert result.exit_code == 0, result.exception
    assert [p.name for p in tmp_path.iterdir()] == ["graph.onnx"]

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    notes = session.get_modelmeta().custom_metadata_map
    check_notes(notes["card.json"], notes["graph.json"], checkpoint, ["flair", "t2"])
    x, want = expected(checkpoint, ["flair", "t2"])
    (got,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


class Odd(torch.nn.Module):
    """A backbone whose logits are a function of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def encode(self, x, _mask):
        return [[x]]

    def fuse(self, features, _mask):
        (x,) = features[0]
        return Fused(self.function(x), x, [])


def as_torchscript(function):
    return window_graph.export(Checkpoint(card("odd", 8), Odd(function)), [True] * 4, "torchscript")


def test_a_graph_that_computes_something_else_is_refused():
    # The trace keeps a number that was read from the example.
    with pytest.raises(UserError, match=r"^odd cannot be written as torchscript: .* differ .* more than 1e-04$"):
        as_torchscript(lambda x: x * float(x.abs().max()) * 100)
    with pytest.raises(UserError, match=r"differ from the network's by nan"):
        as_torchscript(lambda x: x * float("nan"))
    graph = as_torchscript(lambda x: x * 100)
    assert graph.difference == 0
    assert torch.jit.load(io.BytesIO(graph.content))(torch.zeros(1, 4, 8, 8, 8)).allclose(torch.tensor(0.25))


@pytest.mark.slow
def test_an_operation_that_onnx_lacks_is_named_in_one_line():
    checkpoint = Checkpoint(card("odd", 8), Odd(torch.special.bessel_j0))
    with pytest.raises(UserError) as refused:
        window_graph.export(checkpoint, [True] * 4, "onnx")
    assert str(refused.value).startswith("odd cannot be written as onnx: ")
    assert "bessel_j0" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_without_the_extra_it_says_what_to_install(small_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what Python takes for not installed
    result = run(small_checkpoint, "--format", "onnx", "-o", tmp_path / "g.onnx")
    assert isinstance(result.exception, UserError)
    assert "onnx needs onnxruntime" in str(result.exception)
    assert "pip install 'passion-seg[export]'" in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "--format", "onnx", "-o", "g"), "nowhere: no checkpoint here"),
        (("model", "--format", "tflite", "-o", "g"), "no format 'tflite': choose one of torchscript, onnx"),
        (("model", "--format", "onnx", "-o", "g", "--modalities", "t1+dwi"), "'dwi' is no modality"),
        (("model", "--format", "onnx", "-o", "g", "--modalities", ""), "'' is no modality"),
        (("model", "--format", "onnx", "-o", "model"), "model exists"),
        (("model", "--format", "onnx", "-o", "no/g"), "no is no folder"),
    ],
)
def test_bad_requests_are_refused_and_nothing_is_written(small_checkpoint, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_checkpoint, "model")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    result = run(*arguments)
    assert isinstance(result.exception, UserError), result.output
    assert message in str(result.exception)
    assert len(str(result.exception).splitlines()) == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_help_loads_no_heavy_library():
    import subprocess

    code = (
        "import sys, training.cli\n"
        "print([m for m in ('torch', 'onnx', 'onnxscript', 'onnxruntime', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
