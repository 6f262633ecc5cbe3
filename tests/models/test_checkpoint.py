"""Checkpoints: whole or refused, and never a pickle."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.backbone import Backbone
from models.backbones import BACKBONES, build
from models.checkpoint import Checkpoint, CheckpointError, recover, save_card, save_checkpoint
from models.task import Task


@pytest.fixture
def copy(small_checkpoint, tmp_path):
    return shutil.copytree(small_checkpoint, tmp_path / "copy")


def test_what_is_saved_is_what_is_loaded(small_checkpoint):
    loaded = Checkpoint.load(small_checkpoint)
    tensors = load_file(small_checkpoint / "weights.safetensors")
    assert all(torch.equal(tensors[k], v) for k, v in loaded.network.state_dict().items())
    assert loaded.card.intended_use.startswith("Research")
    assert sorted(p.name for p in small_checkpoint.iterdir()) == ["card.json", "weights.safetensors"]
    assert not loaded.network.training


def test_changed_weights_are_refused(copy):
    tensors = load_file(copy / "weights.safetensors")
    tensors["decoder_sep.seg_layer.bias"] += 1
    save_file(tensors, copy / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"sha256 .* changed or the copy is incomplete"):
        Checkpoint.load(copy)


def test_a_cut_file_is_refused(copy):
    blob = (copy / "weights.safetensors").read_bytes()
    (copy / "weights.safetensors").write_bytes(blob[: len(blob) // 2])
    with pytest.raises(CheckpointError, match="incomplete"):
        Checkpoint.load(copy)


def test_missing_files_are_named(copy, tmp_path):
    (copy / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read weights\.safetensors"):
        Checkpoint.load(copy)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        Checkpoint.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"backbone": "nonesuch"}, "no backbone 'nonesuch'"), ({"width": 16}, "do not fit"), ({"width": 0}, "width")],
)
def test_a_card_that_does_not_fit_the_weights_is_refused(copy, change, message):
    card = json.loads((copy / "card.json").read_text())
    (copy / "card.json").write_text(json.dumps(card | change))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.load(copy)


def test_a_pickle_in_place_of_weights_is_refused_without_being_read(copy):
    import hashlib
    import pickle

    class Boom:
        def __reduce__(self):
            return (exec, ("raise SystemExit('a pickle was run')",))

    blob = pickle.dumps(Boom())
    (copy / "weights.safetensors").write_bytes(blob)
    card = json.loads((copy / "card.json").read_text())
    (copy / "card.json").write_text(json.dumps(card | {"weights_sha256": hashlib.sha256(blob).hexdigest()}))
    with pytest.raises(CheckpointError, match="do not fit"):
        Checkpoint.load(copy)


def test_a_save_killed_between_its_renames_is_finished(small_checkpoint, tmp_path):
    target = tmp_path / "run"
    shutil.copytree(small_checkpoint, tmp_path / ".run.new")
    shutil.copytree(small_checkpoint, tmp_path / ".run.old")
    recover(target)
    Checkpoint.load(target)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_saving_replaces_the_whole_folder(small_checkpoint, tmp_path):
    loaded = Checkpoint.load(small_checkpoint)
    target = tmp_path / "run"
    save_checkpoint(target, loaded.card, loaded.network, {"extra.json": b"{}"})
    save_checkpoint(target, loaded.card, loaded.network)
    assert sorted(p.name for p in target.iterdir()) == ["card.json", "weights.safetensors"]
    save_card(target, loaded.card.model_copy(update={"description": "new"}))
    assert Checkpoint.load(target).card.description == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_offers_the_three_methods(name):
    assert isinstance(build(name, Task.load("glioma"), 8), Backbone)
