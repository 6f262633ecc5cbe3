"""The plain U-Net: the protocol, averaging over what is there, and that it learns."""

import pytest
import torch

from models.backbone import Backbone
from models.backbones import build
from models.backbones.unet import mean_of_present
from models.task import Task
from training.passion.objective import terms

pytestmark = pytest.mark.usefixtures("one_thread")

PATCH = (32, 24, 16)
BEFORE_A_NORM = ".conv.bias"
"""How the names of biases end that a norm takes away again: they get no gradient."""


def changed(task, **fields):
    return Task.model_validate(task.model_dump() | fields)


@pytest.fixture(scope="module")
def task():
    return changed(Task.load("glioma"), patch_size=PATCH)


@pytest.fixture(scope="module")
def pair_task(task):
    """Two modalities and three classes."""
    regions = [{"name": "all", "labels": (1, 2)}]
    return changed(task, modalities=task.modalities[:2], labels=task.labels[:3], regions=regions)


def made(task, width=4):
    torch.manual_seed(5)
    network = build("unet", task, width)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(1, len(task.names), *task.patch_size, generator=generator)
    labels = torch.zeros(1, *task.patch_size, dtype=torch.long)
    for label in range(1, len(task.labels)):  # nested boxes, brighter one by one
        inner = (slice(None), *[slice(2 * label, -2 * label)] * 3)
        labels[inner] = label
    x += labels[:, None]
    return network, x, labels


@pytest.mark.parametrize("kind", ["task", "pair_task"])
def test_it_keeps_the_protocol_for_every_subset(kind, request):
    task = request.getfixturevalue(kind)
    network, x, _ = made(task)
    assert isinstance(network, Backbone)
    x = torch.cat([x, x.flip(1)])  # two samples
    classes = len(task.labels)
    for subset in task.subsets():
        mask = task.mask(subset)
        with torch.no_grad():
            features = network.encode(x, mask)
            fused = network.fuse(features, mask)
            alone = network.separate(features)
        for level, of_level in enumerate(features):
            for feature, there in zip(of_level, mask, strict=True):
                assert (feature is not None) == there
                if there:
                    assert feature.shape == (2, 4 * 2**level, *(p // 2**level for p in PATCH))
        assert fused.logits.shape == (2, classes, *PATCH)
        assert fused.feature.shape == (2, 4, *PATCH)
        assert [d.shape for d in fused.deep] == [(2, classes, *(p // 2**lv for p in PATCH)) for lv in (1, 2, 3)]
        assert [None if a is None else a.shape for a in alone] == [(2, classes, *PATCH) if m else None for m in mask]


def test_the_mean_is_over_the_present_only():
    ones, twos, sixes = (torch.full((1, 2, 1, 1, 3), v) for v in (1.0, 2.0, 6.0))
    assert torch.equal(mean_of_present([ones, twos, None, sixes], (True, True, False, True)), ones * 3)
    # Encoded, but not asked for: a student sees one modality of the teacher's features.
    assert torch.equal(mean_of_present([ones, twos, None, sixes], (False, False, False, True)), sixes)
    with pytest.raises(ValueError, match="not encoded"):
        mean_of_present([ones, twos, None, sixes], (True, False, True, False))


def test_what_is_fused_is_the_mean_at_every_level(task):
    network, x, _ = made(task)
    mask = task.mask(["flair", "t1", "t2"])
    with torch.no_grad():
        features = network.encode(x, mask)
        means = [torch.stack([level[0], level[2], level[3]]).mean(0) for level in features]
        alike = [[mean if there else None for there in mask] for mean in means]
        averaged = network.fuse(features, mask)
        by_hand = network.fuse(alike, (True, False, False, False))
    torch.testing.assert_close(averaged.logits, by_hand.logits)
    for a, b in zip(averaged.deep, by_hand.deep, strict=True):
        torch.testing.assert_close(a, b)


def test_a_missing_modality_changes_no_bit(task):
    mask = task.mask(["t1ce", "t2"])
    results = []
    for absent in (0.0, float("nan")):
        network, x, labels = made(task)
        x[:, [0, 2]] = absent
        losses = terms(network, x, labels, [mask], len(task.labels))
        losses.passion(torch.ones(4), torch.ones(4)).backward()
        results.append((losses.samples[0].teacher.logits, {n: p.grad for n, p in network.named_parameters()}))
    (logits, grads), (other_logits, other_grads) = results
    assert torch.equal(logits, other_logits)
    for name, grad in grads.items():
        if name.startswith(("flair_", "t1_")) or name.endswith(BEFORE_A_NORM):
            assert grad is None
            assert other_grads[name] is None
        else:
            assert torch.equal(grad, other_grads[name]), name


def test_passion_reaches_every_weight_of_what_is_there(task):
    network, x, labels = made(task)
    mask = task.mask(["flair", "t1", "t2"])
    losses = terms(network, x, labels, [mask], len(task.labels))
    assert losses.kl[0, [0, 2, 3]].gt(0).all()
    assert losses.proto[0, [0, 2, 3]].gt(0).all()
    assert losses.sep[0].gt(0).tolist() == list(mask)
    losses.passion(torch.ones(4), torch.ones(4)).backward()
    for name, parameter in network.named_parameters():
        if name.startswith("t1ce_") or name.endswith(BEFORE_A_NORM):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert name.endswith(".bias") or parameter.grad.any(), name


def test_a_few_steps_lower_every_part_of_the_loss(pair_task):
    network, x, labels = made(pair_task)
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)
    parts = []
    for _ in range(12):
        losses = terms(network, x, labels, [(True, True)], len(pair_task.labels))
        parts.append([losses.fuse.item(), losses.prm.item(), losses.sep.sum().item()])
        optimiser.zero_grad()
        losses.passion(torch.ones(2), torch.ones(2)).backward()
        optimiser.step()
    for first, last in zip(parts[0], parts[-1], strict=True):
        assert last < 0.8 * first


@pytest.mark.parametrize("patch", [(20, 16, 16), (16, 16, 8)])
def test_a_patch_that_cannot_be_halved_three_times_is_refused(task, patch):
    with pytest.raises(ValueError, match="multiples of 8, at least 16"):
        build("unet", changed(task, patch_size=patch), 4)
