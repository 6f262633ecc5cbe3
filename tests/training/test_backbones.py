"""A backbone is a plug-in, and what each one costs."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from models.backbone import Backbone, Fused
from models.backbones import BACKBONES, BackboneEntry, build
from models.checkpoint import Checkpoint
from models.task import Task
from training.cli import app
from training.config import TrainConfig
from training.errors import UserError
from training.footprint import Ledger, footprint, measure
from training.trainer import Trainer

KEYS = Path(__file__).parents[1] / "golden" / "networks"
ALL, ONE = (True,) * 4, (False, True, False, False)
CUBE = (32, 32, 32)


def glioma(*patch):
    return Task.model_validate(Task.load("glioma").model_dump() | {"patch_size": patch})


footprint_once = cache(footprint)
"""Each takes seconds, and several tests look at the same one."""


def cost_of(name, patch, mask=ALL):
    return footprint_once(name, glioma(*patch), 8, mask)


class Strange(nn.Module):
    """A backbone that shares nothing with those of the package: one encoder for all, the voxel-wise maximum of two
    levels, nearest-neighbour upsampling."""

    def __init__(self, task, width):
        super().__init__()
        classes = len(task.labels)
        self.fine = nn.Conv3d(1, width, 3, padding=1)
        self.coarse = nn.Conv3d(width, width, 2, stride=2)
        self.early = nn.Conv3d(width, classes, 1)
        self.late = nn.Conv3d(width, classes, 1)
        self.lone = nn.Conv3d(width, classes, 1)

    def encode(self, x, mask):
        fine = [self.fine(x[:, k : k + 1]).relu() if there else None for k, there in enumerate(mask)]
        return [fine, [None if f is None else self.coarse(f).relu() for f in fine]]

    def fuse(self, features, mask):
        fine, coarse = (
            torch.stack([f for f, there in zip(level, mask, strict=True) if there]).amax(0) for level in features
        )
        feature = fine + nn.functional.interpolate(coarse, scale_factor=2)
        return Fused(logits=self.late(feature), feature=feature, deep=[self.early(coarse)])

    def separate(self, features):
        return [None if f is None else self.lone(f) for f in features[0]]


@pytest.mark.usefixtures("one_thread")
def test_a_backbone_from_outside_trains_and_comes_back(small_data, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKBONES, "strange", BackboneEntry(Strange, 2, "nowhere"))
    data, split = small_data
    settings = {"data": data, "split": split, "out": tmp_path, "backbone": "strange", "width": 4, "epochs": 1}
    trainer = Trainer(TrainConfig.model_validate(settings | {"device": "cpu"}))
    assert isinstance(trainer.network, Backbone)
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    assert trainer.run()

    record = json.loads((tmp_path / "log.jsonl").read_text())
    assert record["loss"]["kl"] > 0
    assert record["loss"]["proto"] > 0
    assert not any(torch.equal(p, before[name]) for name, p in trainer.network.named_parameters())

    loaded = Checkpoint.load(tmp_path / "checkpoint")
    assert loaded.card.backbone == "strange"
    x, mask = torch.randn(1, 4, 16, 16, 16), (False, True, True, False)
    with torch.no_grad():
        ours, theirs = (n.fuse(n.encode(x, mask), mask).logits for n in (trainer.network, loaded.network))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_ledger_counts_what_is_alive(device):
    existing = torch.zeros(100, device=device)
    with Ledger([existing]) as ledger:
        assert ledger.alive == 400
        a = torch.zeros(1000, device=device)
        b = (a.view(10, 100) + existing).t()  # a view takes nothing
        assert ledger.alive == 8400
        del a
        b += 1
        c = b.double()
        assert (ledger.alive, ledger.peak) == (12400, 12400)
        del b, c
        assert (ledger.alive, ledger.peak) == (400, 12400)
        assert ledger.was_read(existing)


def test_the_ledger_counts_what_waits_for_the_backward_pass():
    weight = torch.zeros(1000, device="meta", requires_grad=True)
    with Ledger([weight]) as ledger:
        loss = weight.exp().sum()  # exp keeps its result
        assert ledger.alive == 2 * 4000 + 4
        loss.backward()
        assert ledger.alive == 2 * 4000 + 4  # now the gradient in its place
        assert ledger.peak == 3 * 4000 + 2 * 4


@pytest.mark.parametrize("name", ["rfnet", "mmformer", "m2ftrans"])
def test_the_parameters_are_those_of_the_published_layout(name):
    shapes = json.loads((KEYS / f"{name}_32_keys.json").read_text())
    cost = cost_of(name, CUBE)
    assert cost.parameters == sum(math.prod(shape) for shape in shapes.values())
    separate = sum(math.prod(shape) for key, shape in shapes.items() if key.startswith("decoder_sep."))
    assert 0 < cost.inference_parameters <= cost.parameters - separate


@pytest.mark.parametrize(("name", "mask"), [("rfnet", ALL), ("unet", ALL), ("unet", ONE)])
def test_inference_needs_all_but_the_separate_decoder(name, mask):
    # Whatever is missing today, its encoder is there.
    separate = sum(p.numel() for p in build(name, glioma(*CUBE), 8).decoder_sep.parameters())
    cost = cost_of(name, CUBE, mask)
    assert cost.inference_parameters == cost.parameters - separate


def test_memory_and_arithmetic_grow_with_crop_and_modalities():
    large, small, fewer = cost_of("unet", CUBE), cost_of("unet", (16, 32, 32)), cost_of("unet", CUBE, ONE)
    assert large.flops == 2 * small.flops
    assert fewer.flops < large.flops
    for less in (small, fewer):
        assert less.memory.step < large.memory.step
        assert less.memory.window < large.memory.window
    weights = 4 * large.parameters
    assert large.memory.window > weights
    assert large.memory.step > 5 * weights  # with gradients and three moments


def test_the_unet_is_the_light_one():
    light, heavy = cost_of("unet", CUBE), cost_of("rfnet", CUBE)
    assert light.flops < 0.8 * heavy.flops
    assert light.memory.step < 0.7 * heavy.memory.step
    assert light.memory.window < 0.7 * heavy.memory.window


@pytest.mark.slow
def test_what_is_computed_is_near_what_a_process_takes():
    task = glioma(48, 48, 48)
    measured = measure("unet", task, 8, ALL, "cpu")
    computed = footprint("unet", task, 8, ALL).memory
    assert 0.8 * computed.step < measured.step < 2 * computed.step
    assert measured.window < measured.step


def run(*arguments):
    return CliRunner().invoke(app, ["backbones", *arguments], env={"COLUMNS": "80"})


def test_the_command_lists_every_backbone_with_its_source(monkeypatch):
    monkeypatch.setattr("training.footprint.footprint", footprint_once)
    result = run("--crop", "32,32,32")
    assert result.exit_code == 0, result.output
    assert "flair+t1ce+t1+t2" in result.output
    for name, entry in BACKBONES.items():
        assert f"{name}: {entry.source}" in result.output
        row = next(line for line in result.output.splitlines() if line.startswith(f"│ {name} "))
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[1] == str(entry.divisor)
        assert int(cells[2].replace(",", "")) >= int(cells[3].replace(",", "")) > 0
        assert float(cells[4]) > float(cells[5]) > 0


def test_a_backbone_that_does_not_fit_says_why_and_the_others_still_stand():
    result = run("unet", "rfnet", "--crop", "16,16,16", "--width", "4", "--modalities", "t2w+FLAIR")
    assert result.exit_code == 0, result.output
    assert "flair+t2" in result.output
    assert "rfnet: width 4 must be a multiple of 8" in result.output
    assert "unet: U-Net" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vgg"], "no backbone 'vgg': choose of rfnet"),
        (["--task", "knee"], "--task: no task 'knee'"),
        (["--crop", "80"], "write it as 80,80,80"),
        (["--crop", "80,80,2"], "--crop: .*too small"),
        (["--modalities", "flair+pet"], "--modalities: 'pet' is no modality"),
        (["--measure", "--device", "abacus"], "device 'abacus' is unknown"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, message):
    result = run(*arguments)
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise result.exception
    assert "\n" not in str(result.exception)


class Greedy(Strange):
    def encode(self, x, mask):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_too_little_gpu_memory_says_what_to_lower(small_data, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKBONES, "greedy", BackboneEntry(Greedy, 2, "nowhere"))
    data, split = small_data
    values = {"data": data, "split": split, "out": tmp_path, "backbone": "greedy", "device": "cpu", "epochs": 1}
    with pytest.raises(UserError, match=r"batch_size 1 and crop 16x16x16: lower one of them"):
        Trainer(TrainConfig.model_validate(values)).run()
