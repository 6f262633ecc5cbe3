"""M2FTrans: any subset, any modalities and patch; what a token may see, and what the gate lets through."""

import json
from pathlib import Path

import pytest
import torch

from models.backbone import Backbone
from models.backbones import build
from models.backbones.m2ftrans import MaskedAttention
from models.task import Label, Modality, Region, Task

KEYS = Path(__file__).parents[1] / "golden" / "networks" / "m2ftrans_32_keys.json"
GLIOMA = Task.load("glioma").model_copy(update={"patch_size": (32, 32, 32)})


def glioma_network():
    torch.manual_seed(1)
    network = build("m2ftrans", GLIOMA, width=8).eval()
    with torch.no_grad():
        network.pos.normal_()
    return network


@pytest.fixture(scope="module")
def network():
    return glioma_network()


@pytest.fixture(scope="module")
def heart():
    """Two modalities, three classes, a patch of three different sides: 2 x 3 x 4 tokens a group."""
    torch.manual_seed(2)
    task = Task(
        name="heart",
        modalities=(Modality(name="bssfp"), Modality(name="lge")),
        labels=tuple(Label(name=name, value=value) for value, name in enumerate(("background", "blood", "muscle"))),
        regions=(Region(name="heart", labels=(1, 2)),),
        patch_size=(32, 48, 64),
        spacing=(4.0, 1.0, 1.0),
    )
    return build("m2ftrans", task, width=4).eval()


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors(fused):
    return (fused.logits, fused.feature, *fused.deep)


def test_state_dict_names_and_shapes_are_the_published_ones(network):
    assert {name: list(tensor.shape) for name, tensor in network.state_dict().items()} == json.loads(KEYS.read_text())
    assert isinstance(network, Backbone)


def test_positions_start_at_zero_and_fusion_tokens_at_random():
    torch.manual_seed(4)
    fresh = build("m2ftrans", GLIOMA, width=8)
    assert not fresh.pos.any()
    assert fresh.fusion.std().item() == pytest.approx(1, abs=0.1)
    assert fresh.fusion.mean().item() == pytest.approx(0, abs=0.1)


def test_every_subset_runs_and_absent_channels_are_never_read(network):
    x = random(1, 4, 32, 32, 32, seed=3)
    logits = []
    with torch.inference_mode():
        everything = network.encode(x, (True,) * 4)
        for subset in GLIOMA.subsets():
            mask = GLIOMA.mask(subset)
            absent = x.clone()
            absent[:, [k for k, there in enumerate(mask) if not there]] = float("nan")
            fused = network.fuse(network.encode(absent, mask), mask)
            # Students reuse the features of a pass that encoded more than they are given.
            chosen = network.fuse(everything, mask)
            assert all(torch.equal(a, b) for a, b in zip(tensors(fused), tensors(chosen), strict=True))
            assert fused.logits.isfinite().all()
            assert fused.logits.shape == (1, 4, 32, 32, 32)
            assert fused.feature.shape == (1, 8, 32, 32, 32)
            assert [d.shape[-1] for d in fused.deep] == [32, 16, 8, 4, 2]
            logits.append(fused.logits)
    assert len(logits) == 15
    assert not any(torch.equal(a, b) for i, a in enumerate(logits) for b in logits[:i])


def test_separate_gives_the_encoded_modalities_only(network):
    x = random(1, 4, 32, 32, 32, seed=4)
    with torch.inference_mode():
        every = network.separate(network.encode(x, (True,) * 4))
        two = network.separate(network.encode(x, (True, False, False, True)))
    assert two[1] is None
    assert two[2] is None
    assert torch.equal(two[0], every[0])
    assert torch.equal(two[3], every[3])


def test_two_modalities_and_a_patch_of_three_different_sides(heart):
    assert heart.pos.shape == (1, 3 * 2 * 3 * 4, 64)
    assert "decoder_fusion.CT5.layers.1.cross_attn.value_map_lge.conv1.weight" in heart.state_dict()
    x = random(2, 2, 32, 48, 64, seed=5)
    with torch.inference_mode():
        for mask in ((True, True), (False, True)):
            features = heart.encode(x, mask)
            fused = heart.fuse(features, mask)
            assert fused.logits.shape == (2, 3, 32, 48, 64)
            assert [tuple(d.shape) for d in fused.deep] == [(2, 3, 32 // s, 48 // s, 64 // s) for s in (1, 2, 4, 8, 16)]
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


def test_attention_is_that_of_the_whole_matrix_with_a_mask():
    """Two groups of three modality tokens and three fusion tokens, against the (9, 9) matrix of every head."""
    torch.manual_seed(6)
    attention = MaskedAttention(16, heads=2, dropout=0.1).eval()
    x = torch.randn(2, 3, 3, 16)
    flat = x.flatten(1, 2)
    q, k, v = attention.qkv(flat).split(16, dim=2)
    group = torch.arange(9) // 3
    may_see = (group[:, None] == group[None]) | (group[:, None] == 2)
    heads, matrices = [], []
    for h in (slice(0, 8), slice(8, 16)):
        scores = q[..., h] @ k[..., h].transpose(1, 2) / 8**0.5
        matrices.append(scores.masked_fill(~may_see, float("-inf")).softmax(2))
        heads.append(matrices[-1] @ v[..., h])
    seen, weights = attention(x)
    torch.testing.assert_close(seen.flatten(1, 2), attention.proj(torch.cat(heads, 2)))
    torch.testing.assert_close(weights, torch.stack(matrices, 1)[:, :, 6:])


def test_the_gate_sums_what_the_fusion_tokens_saw_and_passes_no_gradient(network):
    x = random(1, 3, 8, 128, seed=7).requires_grad_()
    tokens, gate = network.Bottleneck(x)
    first = network.Bottleneck.trans_bottle.cross_attention_list[0]
    _, weights = first(x)
    assert tokens.requires_grad
    assert not gate.requires_grad
    for p in range(2):
        torch.testing.assert_close(gate[:, p], weights[..., 8 * p : 8 * p + 8].sum((1, 2)))


def test_missing_modalities_get_no_gradient_and_everything_else_does():
    """Of every weight that a fused pass of flair and t1 has to do with; the others are those of t1ce and t2."""
    network = glioma_network()
    mask = (True, False, True, False)
    features = network.encode(random(1, 4, 32, 32, 32, seed=8), mask)
    fused = network.fuse(features, mask)
    alone = [logits for logits in network.separate(features) if logits is not None]
    sum(t.square().sum() for t in (fused.logits, *fused.deep, *alone)).backward()
    # A bias before a norm has none either: the norm takes it away.
    others = {name for name, _ in network.named_parameters() if not name.endswith("conv.bias")}
    assert {name for name in others if network.get_parameter(name).grad is None} == {
        name
        for name in others
        if name.startswith(("t1ce_encoder.", "t2_encoder.")) or "_map_t1ce." in name or "_map_t2." in name
    }
    positions = network.pos.grad.unflatten(1, (5, -1))[0].abs().sum((1, 2)) > 0
    assert positions.tolist() == [True, False, True, False, True]


def test_dropout_is_active_in_train_mode_only():
    network = glioma_network()
    x = random(1, 4, 32, 32, 32, seed=9)
    mask = (True, False, False, False)

    def logits(seed):
        torch.manual_seed(seed)
        return network.fuse(network.encode(x, mask), mask).logits

    with torch.inference_mode():
        assert torch.equal(logits(1), logits(2))
        network.train()
        assert torch.equal(logits(1), logits(1))
        assert not torch.equal(logits(1), logits(2))
