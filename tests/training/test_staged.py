"""The backward pass in stages against autograd's on the whole graph, in double precision."""

import pytest
import torch

from models.backbones import BACKBONES, build
from models.task import Task
from training.footprint import Ledger, Patch
from training.methods import METHODS, build_method
from training.methods.base import settle
from training.passion.branches import in_turn
from training.passion.objective import Coefficients, terms
from training.passion.staged import assigning, staged, with_gradients

MASKS = [(True, False, True, True), (False, True, False, False), (True, True, False, False)]
"""Of a batch: three modalities, one that is its own teacher, two."""
ALL = [(True,) * 4] * 3
MODAL_WEIGHT = torch.tensor([1.5, 4.0, 1.0, 2.0], dtype=torch.float64)
LOSSES = ("fuse", "prm", "sep", "kl", "proto", "dist", "mask", "present")


def made(backbone):
    side, width = (16, 8) if backbone in {"rfnet", "unet"} else (32, 4)  # the smallest, and RFNet no narrower
    torch.manual_seed(3)
    task = Task.load("glioma").model_copy(update={"patch_size": (side, side, side)})
    network = build(backbone, task, width=width).double().train()
    x = torch.randn(3, 4, side, side, side, dtype=torch.float64).contiguous(memory_format=torch.channels_last_3d)
    labels = (torch.rand(3, side, side, side) * 4).to(torch.uint8)
    labels[0][labels[0] == 2] = 1  # one sample lacks a class, so none of the batch has a prototype of it
    return network, x, labels


def gradients(network):
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    return found


def in_stages(method, network, x, labels, present=None):
    """The terms, and the gradients that the optimiser would see."""

    def weigh(losses):
        settle(method, losses)
        return method.coefficients(MODAL_WEIGHT)

    parameters = list(network.parameters())
    losses, found = staged(network, parameters, x, labels, MASKS, 4, weigh, present=present, distil=method.distils)
    (3 * with_gradients(method.total(losses, MODAL_WEIGHT), parameters, found) / 3).backward()
    return losses, gradients(network)


def assert_equal(one, other):
    """Gradients by name; one that one of them lacks must be 0 in the other."""
    for name in one | other:
        a, b = (g.get(name) for g in (one, other))
        zero = torch.zeros_like(a if a is not None else b)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    ("backbone", "present"),
    [*((name, None) for name in BACKBONES), ("unet", ALL)],
    ids=[*BACKBONES, "unet, separate paths of all modalities"],
)
def test_the_losses_and_gradients_are_those_of_the_whole_graph(backbone, present, monkeypatch):
    for module in ("mmformer", "m2ftrans"):  # both draw, in another order
        monkeypatch.setattr(f"models.backbones.{module}.DROPOUT", 0.0)
    network, x, labels = made(backbone)
    method = build_method("passion", list("abcd"), 4)
    method.preference.beta = torch.tensor([0.5, 1.5, 1.0, 0.7])

    whole = terms(network, x, labels, MASKS, 4, present=present)
    settle(method, whole)
    method.total(whole, MODAL_WEIGHT).backward()
    wanted = gradients(network)
    found, got = in_stages(method, network, x, labels, present=present)

    for name in LOSSES:
        torch.testing.assert_close(getattr(found, name), getattr(whole, name).detach(), rtol=1e-10, atol=1e-13)
    lagging = whole.preference() > 0
    assert lagging.any()
    assert not lagging.all()
    assert_equal(got, wanted)


def test_all_modalities_may_be_at_a_stage_at_once():
    """As on a GPU, where what each gives is taken when the last one is there; in another order, as nobody waits."""
    network, x, labels = made("rfnet")
    parameters = list(network.parameters())
    weights = Coefficients(*(torch.tensor([0.7, 1.3, 0.9, 1.1], dtype=torch.float64),) * 3)

    def at_once(paths, then):
        found = [path() for path in reversed(paths)]
        for each in reversed(found):
            then(each)

    def step(apart):
        return staged(network, parameters, x, labels, MASKS, 4, lambda _losses: weights, apart=apart)

    (in_turn_losses, wanted), (losses, got) = step(in_turn), step(at_once)
    for name in LOSSES:
        assert torch.equal(getattr(losses, name), getattr(in_turn_losses, name))
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[i], got[i]) for i in wanted)


@pytest.mark.parametrize(
    "method", [name for name in METHODS if build_method(name, "abcd", 4).coefficients(MODAL_WEIGHT)]
)
def test_every_method_that_weighs_losses_gives_its_total_s_gradients(method):
    network, x, labels = made("unet")
    rule = build_method(method, list("abcd"), 4)

    whole = terms(network, x, labels, MASKS, 4, distil=rule.distils)
    settle(rule, whole)
    total = rule.total(whole, MODAL_WEIGHT)
    total.backward()
    wanted = gradients(network)
    found, got = in_stages(rule, network, x, labels)

    assert_equal(got, wanted)
    assert rule.total(found, MODAL_WEIGHT).item() == pytest.approx(total.item(), rel=1e-10)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_step_holds_three_quarters_of_what_the_whole_graph_does_or_less(backbone):
    patch = Patch(backbone, Task.load("glioma"), 8, "meta")  # shapes without data
    ones = torch.ones(4, device="meta")
    arguments = (patch.network, patch.x, patch.labels, MASKS[:1], 4)
    peaks = []
    for run in (
        lambda: terms(*arguments).weighted(Coefficients(ones, ones, ones)).backward(),
        lambda: patch.step(MASKS[0]),
    ):
        with Ledger(patch.network.parameters(), [patch.x, patch.labels]) as ledger:
            run()
        peaks.append(ledger.peak)
        patch.network.zero_grad()
    assert peaks[1] < 0.75 * peaks[0]


def test_classes_may_be_counted_by_a_mask_and_gradients_assigned():
    """As a step that is recorded does: nothing in it depends on which classes a crop has."""
    network, x, labels = made("unet")
    network = network.eval()
    everything = Coefficients(*(torch.full((4,), weight, dtype=torch.float64) for weight in (0.7, 1.3, 0.9)))
    parameters = list(network.parameters())

    def step(counted, hand_out):
        one = labels[:1]
        losses, found = staged(
            network, parameters, x[:1], one, MASKS[:1], 4, lambda _losses: everything, counted=counted
        )
        (2 * hand_out(losses.fuse.sum(), parameters, found)).backward()
        return losses, gradients(network)

    assert sorted(labels[0].unique().tolist()) == [0, 1, 3]
    by_index, wanted = step([0, 1, 3], with_gradients)
    by_mask, got = step(torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64), assigning)
    for name in LOSSES:
        torch.testing.assert_close(getattr(by_mask, name), getattr(by_index, name))
    assert (by_index.proto > 0).any()
    assert got.keys() == wanted.keys()
    assert_equal(got, wanted)
