"""mmFormer: any subset, any number of modalities, any patch; nothing of an absent modality is read."""

import json
from pathlib import Path

import pytest
import torch

from models.backbone import Backbone
from models.backbones import build
from models.task import Label, Modality, Region, Task

KEYS = Path(__file__).parents[1] / "golden" / "networks" / "mmformer_32_keys.json"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    task = Task.load("glioma").model_copy(update={"patch_size": (32, 32, 32)})
    network = build("mmformer", task, width=8).eval()
    with torch.no_grad():
        for name in task.names:
            network.get_parameter(f"{name}_pos").normal_()
    return network


@pytest.fixture(scope="module")
def heart():
    """Two modalities, three classes, a patch of three different sides: a grid of 2 x 3 x 4 tokens."""
    torch.manual_seed(2)
    task = Task(
        name="heart",
        modalities=(Modality(name="bssfp"), Modality(name="lge")),
        labels=tuple(Label(name=name, value=value) for value, name in enumerate(("background", "blood", "muscle"))),
        regions=(Region(name="heart", labels=(1, 2)),),
        patch_size=(32, 48, 64),
        spacing=(4.0, 1.0, 1.0),
    )
    return build("mmformer", task, width=8).eval()


def names_and_shapes(network):
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("train", [True, False])
def test_state_dict_names_and_shapes_are_the_published_ones(network, train):
    network.train(train)
    try:
        assert names_and_shapes(network) == json.loads(KEYS.read_text())
    finally:
        network.eval()
    assert isinstance(network, Backbone)


def test_every_subset_runs_and_absent_channels_are_never_read(network):
    task = Task.load("glioma")
    x = torch.randn(1, 4, 32, 32, 32, generator=torch.Generator().manual_seed(3))
    outputs = []
    with torch.inference_mode():
        everything = network.encode(x, (True,) * 4)
        for subset in task.subsets():
            mask = task.mask(subset)
            absent = x.clone()
            absent[:, [k for k, there in enumerate(mask) if not there]] = float("nan")
            alone = network.fuse(network.encode(absent, mask), mask)
            chosen = network.fuse(everything, mask)
            for ours, theirs in zip(
                (alone.logits, alone.feature, *alone.deep), (chosen.logits, chosen.feature, *chosen.deep), strict=True
            ):
                assert torch.equal(ours, theirs)
            assert alone.logits.shape == (1, 4, 32, 32, 32)
            assert alone.feature.shape == (1, 8, 32, 32, 32)
            assert [d.shape[-1] for d in alone.deep] == [16, 8, 4, 2]
            assert alone.logits.isfinite().all()
            outputs.append(alone.logits)
    assert len(outputs) == 15
    assert not any(torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


def test_separate_gives_the_encoded_modalities_only(network):
    x = torch.randn(1, 4, 32, 32, 32, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        every = network.separate(network.encode(x, (True,) * 4))
        two = network.separate(network.encode(x, (True, False, False, True)))
    assert two[1] is None
    assert two[2] is None
    assert torch.equal(two[0], every[0])
    assert torch.equal(two[3], every[3])


def test_two_modalities_and_a_patch_of_three_different_sides(heart):
    assert heart.get_parameter("lge_pos").shape == (1, 2 * 3 * 4, 512)
    x = torch.randn(2, 2, 32, 48, 64, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        for mask in ((True, True), (False, True)):
            features = heart.encode(x, mask)
            fused = heart.fuse(features, mask)
            assert fused.logits.shape == (2, 3, 32, 48, 64)
            assert [tuple(d.shape) for d in fused.deep] == [(2, 3, 32 // s, 48 // s, 64 // s) for s in (2, 4, 8, 16)]
            assert [None if s is None else tuple(s.shape) for s in heart.separate(features)] == [
                (2, 3, 32, 48, 64) if there else None for there in mask
            ]
            second = heart.fuse(heart.encode(x[1:], mask), mask)
            torch.testing.assert_close(fused.logits[1:], second.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 48, 48), (64, 48, 32)])
def test_another_size_is_refused(heart, size):
    with pytest.raises(ValueError, match=r"\(32, 48, 64\).*" + r"\({}, {}, {}\)".format(*size)):
        heart.encode(torch.zeros(1, 2, *size), (True, True))


def test_a_mask_of_what_was_not_encoded_is_refused(heart):
    features = heart.encode(torch.zeros(1, 2, 32, 48, 64), (True, False))
    with pytest.raises(ValueError, match="modality 1"):
        heart.fuse(features, (True, True))


def test_dropout_is_drawn_from_the_global_generator_and_in_train_mode_only(network):
    x = torch.randn(1, 4, 32, 32, 32, generator=torch.Generator().manual_seed(6))
    mask = (True, False, False, False)

    def logits(seed):
        torch.manual_seed(seed)
        return network.fuse(network.encode(x, mask), mask).logits

    with torch.inference_mode():
        assert torch.equal(logits(1), logits(2))
        network.train()
        try:
            assert torch.equal(logits(1), logits(1))
            assert not torch.equal(logits(1), logits(2))
        finally:
            network.eval()
