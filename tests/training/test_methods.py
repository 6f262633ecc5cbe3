"""The methods behind `TrainConfig.method`: each rule's equation by hand, what it leaves alone, and that it resumes."""

import json
import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from models.backbone import Fused
from training.config import TrainConfig
from training.errors import UserError
from training.methods import METHODS, build_method
from training.methods.base import settle
from training.methods.discrepancy import class_mean, comparable, discrepancy
from training.methods.dwa import Dwa, averaged
from training.methods.epoch_means import EpochMeans
from training.methods.ogm_ge import OgmGe, coefficients, modulate, scores
from training.methods.pmr import Pmr, Reading, holds, pulls
from training.passion.losses import Truth
from training.passion.objective import EVERYTHING, Sample, Switches, Terms
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

W = torch.ones(2)


def truth_of(labels, classes=2):
    return Truth.of(torch.tensor(labels).view(1, 1, -1), classes)


def sample_of(mask, labels, alone=None, features=None, classes=2):
    """A sample whose volume is a row of voxels. `alone` has the true class's probability by modality and voxel, of two
    classes; `features` (F, V) by modality."""
    truth = truth_of(labels, classes)
    logits = torch.zeros(1, classes, 1, 1, len(labels))
    probabilities = []
    for p in alone or [None] * len(mask):
        if p is None:
            probabilities.append(None)
            continue
        rows = torch.zeros(2, len(labels))
        rows.scatter_(0, truth.labels[None], torch.tensor([p]))
        rows.scatter_(0, 1 - truth.labels[None], 1 - torch.tensor([p]))
        probabilities.append(rows)
    volumes = [None if f is None else f[None, :, None, None] for f in features or [None] * len(mask)]
    return Sample(tuple(mask), truth, [volumes], Fused(logits, logits, []), probabilities)


def terms_of(samples, sep=None, present=None, fuse=1.0, prm=2.0):
    """Terms of the samples, `fuse`, `prm` and `sep` (B, K) as given, all else 0."""
    mask = torch.tensor([s.mask for s in samples])
    zeros = torch.zeros(mask.shape)
    return Terms(
        fuse=torch.full((len(samples),), fuse),
        prm=torch.full((len(samples),), prm),
        sep=zeros if sep is None else torch.tensor(sep),
        kl=zeros,
        proto=zeros,
        dist=zeros,
        mask=mask,
        present=mask if present is None else torch.tensor(present),
        samples=samples,
    )


def total_of(method, losses, weight):
    """A step of one batch."""
    settle(method, losses)
    return method.total(losses, weight)


# The ratio that OGM-GE and PMR share


def test_every_class_of_a_sample_has_the_same_say():
    # Three background voxels of mean 0.8 and one of class 1 of 0.2; class 2 is not there.
    mean = class_mean(torch.tensor([0.9, 0.8, 0.7, 0.2]), truth_of([0, 0, 0, 1], classes=3))
    assert mean.item() == pytest.approx(0.5)


def test_the_ratio_is_against_the_mean_of_the_other_present_modalities():
    score = torch.tensor([[0.8, 0.4, 0.4, 0.0]])
    rho = discrepancy(score, torch.tensor([[True, True, True, False]]))
    assert rho.tolist() == pytest.approx([2, 0.4 / 0.6, 0.4 / 0.6, 1])


def test_the_ratio_of_a_batch_is_one_of_sums_over_the_samples_that_compare():
    score = torch.tensor([[0.9, 0.3], [0.3, 0.1], [0.0, 0.7]])
    rho = discrepancy(score, torch.tensor([[True, True], [True, True], [False, False]]))
    assert rho.tolist() == pytest.approx([1.2 / 0.4, 0.4 / 1.2])


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_equal_scores_are_exactly_in_balance(value):
    rho = discrepancy(torch.full((1, 4), value), torch.ones(1, 4, dtype=torch.bool))
    assert rho.tolist() == [1, 1, 1, 1]


def test_one_modality_or_a_crop_of_one_class_says_nothing():
    samples = [
        sample_of([True, False], [0, 1]),
        sample_of([True, True], [0, 0]),
        sample_of([True, True], [0, 1]),
    ]
    assert comparable(samples).tolist() == [[False, False], [False, False], [True, True]]


def test_epoch_means_count_only_what_was_there_and_survive_json():
    means = EpochMeans(["a", "b", "c"])
    means.add(torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([[True, False, False]]))
    means.add(torch.tensor([[2.0, 0.1, 5.0]]), torch.tensor([[True, True, False]]))
    again = EpochMeans(["a", "b", "c"])
    again.restore(json.loads(json.dumps(means.state())))
    assert again.take() == means.take() == {"a": 1.5, "b": pytest.approx(0.1)}
    assert means.take() == {}


# OGM-GE


def ahead():
    """Modality a has score 0.75, b 0.5: rho is 1.5 and 2 / 3."""
    return sample_of([True, True], [0, 0, 0, 1], alone=[[0.9, 0.9, 0.9, 0.6], [0.6, 0.7, 0.8, 0.3]])


class TwoEncoders(nn.Module):
    """What OGM-GE knows of a network: its encoders by name. Every gradient is set."""

    def __init__(self, values=1000):
        super().__init__()
        for name in ("a", "b"):
            encoder = nn.Linear(values, 1)
            for parameter in encoder.parameters():
                parameter.grad = torch.randn(parameter.shape) + 3
            self.add_module(f"{name}_encoder", encoder)

    def gradients(self, name):
        encoder = self.get_submodule(f"{name}_encoder")
        return encoder.weight.grad.clone(), encoder.bias.grad.clone()


def test_ogm_scores_are_the_class_balanced_probability_of_the_truth():
    absent = sample_of([True, False], [0, 1], alone=[[0.5, 0.7], None])
    torch.testing.assert_close(scores([ahead(), absent]), torch.tensor([[0.75, 0.5], [0.6, 0.0]]))


def test_ogm_damps_only_what_is_ahead():
    k = coefficients(torch.tensor([1.5, 1.0, 0.6]), alpha=0.1)
    assert k.tolist() == pytest.approx([1 - math.tanh(0.15), 1, 1])
    assert k[0].item() == pytest.approx(0.851115, abs=1e-6)


def test_ogm_modulates_the_gradient_and_adds_noise_of_its_own_deviation():
    torch.manual_seed(1)
    network = TwoEncoders()
    method = OgmGe(["a", "b"])
    total = total_of(method, terms_of([ahead()], sep=[[4.0, 8.0]]), W)
    assert total.item() == 1 + 2 + 12
    (weight, bias), b = network.gradients("a"), network.gradients("b")

    torch.manual_seed(7)
    method.after_backward(network)
    torch.manual_seed(7)
    noise = torch.randn(weight.shape)
    deviation = (weight - weight.mean()).square().mean().sqrt()
    damped, damped_bias = network.gradients("a")
    torch.testing.assert_close(damped, 0.851115 * weight + noise * deviation, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(damped_bias, 0.851115 * bias, rtol=1e-5, atol=0)  # one number deviates from nothing
    assert all(torch.equal(x, y) for x, y in zip(network.gradients("b"), b, strict=True))
    assert method.end_epoch(0) == {"coefficient": {"a": pytest.approx(0.851115, abs=1e-6), "b": 1}}


@pytest.mark.parametrize(
    "sample",
    [
        pytest.param(sample_of([True, False], [0, 1], alone=[[0.9, 0.9], None]), id="one modality"),
        pytest.param(sample_of([True, True], [0, 1], alone=[[0.3, 0.9], [0.9, 0.3]]), id="balance"),
        pytest.param(sample_of([True, True], [0, 0], alone=[[0.9, 0.9], [0.5, 0.5]]), id="background alone"),
        # Under pdt the separate decoder sees what the fused path lacks; it has no say.
        pytest.param(sample_of([True, False], [0, 1], alone=[[0.9, 0.9], [0.1, 0.1]]), id="not of the fused path"),
    ],
)
def test_ogm_changes_no_gradient_without_a_lead(sample):
    network = TwoEncoders(values=4)
    method = OgmGe(["a", "b"])
    total_of(method, terms_of([ahead()]), W)  # the step before says nothing about this one
    total_of(method, terms_of([sample]), W)
    before = [*network.gradients("a"), *network.gradients("b")]
    random = torch.get_rng_state()
    method.after_backward(network)
    assert all(
        torch.equal(x, y) for x, y in zip([*network.gradients("a"), *network.gradients("b")], before, strict=True)
    )
    assert torch.equal(torch.get_rng_state(), random)


def test_ogm_leaves_a_missing_modality_alone():
    network = TwoEncoders(values=4)
    network.add_module("c_encoder", nn.Linear(2, 1))  # without a gradient
    sample = sample_of([True, True, False], [0, 0, 0, 1], alone=[[0.9, 0.9, 0.9, 0.6], [0.6, 0.7, 0.8, 0.3], None])
    method = OgmGe(["a", "b", "c"])
    total_of(method, terms_of([sample]), torch.ones(3))
    method.after_backward(network)
    assert network.get_submodule("c_encoder").weight.grad is None
    assert set(method.end_epoch(0)["coefficient"]) == {"a", "b"}


def test_modulation_passes_over_weights_without_a_gradient():
    encoder = nn.Linear(2, 1)
    modulate(encoder, 0.5)
    assert encoder.weight.grad is None


# PMR


def test_pmr_classifies_by_the_distance_to_the_prototypes():
    # Voxels (0, 0) of class 0 and (3, 4) of class 1; prototypes (0, 0) and (0, 4): distances 0 and 4, 5 and 3.
    feature = torch.tensor([[0.0, 3.0], [0.0, 4.0]])
    reading = Reading.of(feature, truth_of([0, 1]), [torch.tensor([0.0, 0.0]), torch.tensor([0.0, 4.0])])
    first, second = 1 / (1 + math.exp(-4)), 1 / (1 + math.exp(-2))
    assert reading.score() == pytest.approx((first + second) / 2, rel=1e-3)
    assert reading.cross_entropy().item() == pytest.approx(-(math.log(first) + math.log(second)) / 2, rel=1e-3)

    def entropy(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    assert reading.entropy().item() == pytest.approx((entropy(first) + entropy(second)) / 2, rel=1e-3)


def test_pmr_knows_only_classes_that_it_has_met():
    feature = torch.tensor([[0.0, 2.0]])
    met = Reading.of(feature, truth_of([0, 2], 3), [torch.zeros(1), None, torch.full((1,), 2.0)])
    assert met.log_p.shape == (2, 2)
    assert met.score() == pytest.approx(1 / (1 + math.exp(-2)), rel=1e-3)


def test_pmr_on_a_prototype_pulls_nowhere():
    feature = torch.tensor([[0.0, 2.0]], requires_grad=True)
    Reading.of(feature, truth_of([0, 1]), [torch.zeros(1), torch.full((1,), 2.0)]).cross_entropy().backward()
    assert torch.isfinite(feature.grad).all()
    # Only the far prototype acts: away from it.
    assert feature.grad[0, 0] > 0 > feature.grad[0, 1]


def test_pmr_coefficients_are_clipped_ratios():
    rho = torch.tensor([0.25, 0.8, 1.0, 1.4, 3.0])
    assert pulls(rho).tolist() == pytest.approx([1, 0.25, 0, 0, 0])
    assert holds(rho).tolist() == pytest.approx([0, 0, 0, 0.4, 1])


def lagging():
    """a's classes lie 4 apart and apart from each other's voxels, b's lie one upon the other."""
    a = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    b = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    return a, b


def test_pmr_pulls_the_slow_modality_and_at_first_holds_the_fast_one():
    a, b = (f.requires_grad_() for f in lagging())
    sample = sample_of([True, True], [0, 0, 1, 1], features=[a, b])
    # Prototypes are the voxels' means: 0 and 4 for a, 0 and 0 for b. So p_a(y) = 1 / (1 + e^-4), p_b(y) = 1 / 2.
    fast = 1 / (1 + math.exp(-4))
    pull, hold = min(fast / 0.5 - 1, 1), min(fast / 0.5 - 1, 1)
    entropy = -fast * math.log(fast) - (1 - fast) * math.log(1 - fast)
    method = Pmr(["a", "b"], classes=2)

    total = total_of(method, terms_of([sample]), W)
    assert total.item() == pytest.approx(3 + pull * math.log(2) - 0.1 * hold * entropy, rel=1e-3)
    total.backward()
    assert a.grad.any()
    assert method.end_epoch(0) == {
        "score": {"a": pytest.approx(fast, rel=1e-3), "b": pytest.approx(0.5)},
        "pull": {"a": 0, "b": pytest.approx(pull, rel=1e-3)},
    }

    method.end_epoch(9)  # ten epochs are done
    a.grad = None
    total = total_of(method, terms_of([sample]), W)
    assert total.item() == pytest.approx(3 + pull * math.log(2), rel=1e-3)
    total.backward()
    assert a.grad is None


def test_pmr_prototypes_are_moving_averages_of_what_is_there():
    method = Pmr(["a", "b"], classes=3)
    total_of(
        method,
        terms_of([sample_of([True, False], [0, 0, 2], features=[torch.tensor([[1.0, 3.0, 5.0]]), None], classes=3)]),
        W,
    )
    found = [[None if c is None else c.item() for c in row] for row in method.prototypes]
    assert found == [[2, None, 5], [None, None, None]]
    features = [torch.tensor([[4.0, 4.0, 7.0]]), torch.tensor([[1.0, 1.0, 6.0]])]
    # b is encoded, but the fused path is not given it.
    total_of(method, terms_of([sample_of([True, False], [0, 0, 1], features=features, classes=3)]), W)
    found = [[None if c is None else c.item() for c in row] for row in method.prototypes]
    assert found == [[pytest.approx(0.9 * 2 + 0.1 * 4), 7, 5], [None, None, None]]


@pytest.mark.parametrize(
    ("mask", "labels", "features"),
    [
        pytest.param([True, False], [0, 0, 1, 1], (lagging()[0], None), id="one modality"),
        pytest.param([True, True], [0, 0, 0, 0], lagging(), id="background alone"),
        pytest.param([True, True], [0, 0, 1, 1], (lagging()[0], lagging()[0]), id="balance"),
    ],
)
def test_pmr_is_the_backbones_own_loss_without_a_lead(mask, labels, features):
    losses = terms_of([sample_of(mask, labels, features=list(features))], sep=[[0.5, 0.25]])
    assert total_of(Pmr(["a", "b"], classes=2), losses, W).item() == losses.baseline().item() == 3.75


def test_pmr_reads_labels_on_a_coarser_grid_of_features():
    a, b = (f[:, ::2] for f in lagging())  # two voxels, (0, 4) and (1, 1), for four labels
    method = Pmr(["a", "b"], classes=2)
    total_of(method, terms_of([sample_of([True, True], [0, 0, 1, 1], features=[a, b])]), W)
    assert [[c.item() for c in row] for row in method.prototypes] == [[0, 4], [1, 1]]


def test_pmr_state_survives_json_bit_for_bit():
    torch.manual_seed(0)
    method = Pmr(["a", "b"], classes=2)
    features = [torch.randn(5, 4), torch.randn(5, 4)]
    total_of(method, terms_of([sample_of([True, True], [0, 0, 1, 1], features=features)]), W)
    method.end_epoch(3)
    total_of(method, terms_of([sample_of([True, True], [0, 1, 1, 1], features=features)]), W)
    again = Pmr(["a", "b"], classes=2)
    again.restore(json.loads(json.dumps(method.state())))
    assert again.state() == method.state()
    assert again.epoch == 4
    for ours, theirs in zip(again.prototypes, method.prototypes, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


# DWA


def test_dwa_weights_follow_the_rates_of_descent():
    # w = 0.5 and 1: lambda = 2 e^0.25 / (e^0.25 + e^0.5) and 2 e^0.5 / (e^0.25 + e^0.5).
    weights = averaged([[2.0, 1.0], [3.0, 3.0]])
    assert weights.tolist() == pytest.approx([0.875647, 1.124353], abs=1e-6)
    cold = averaged([[2.0, 1.0], [3.0, 3.0]], temperature=0.5)
    assert cold.tolist() == pytest.approx([2 / (1 + math.e), 2 * math.e / (1 + math.e)])


def test_dwa_weights_are_one_for_the_first_two_epochs_and_in_balance():
    assert averaged([[], []]).tolist() == [1, 1]
    assert averaged([[1.0], [5.0]]).tolist() == [1, 1]
    assert averaged([[4.0, 2.0], [2.0, 1.0], [8.0, 4.0]]).tolist() == pytest.approx([1, 1, 1], abs=1e-12)


def test_dwa_weights_of_the_others_sum_to_what_a_newcomer_leaves():
    weights = averaged([[2.0, 1.0], [3.0], [3.0, 3.0]])
    assert weights.tolist() == pytest.approx([0.875647, 1, 1.124353], abs=1e-6)


def test_dwa_weighs_the_separate_losses_by_the_two_epochs_before():
    method = Dwa(["a", "b"])
    whole, only_b = sample_of([True, True], [0, 1]), sample_of([False, True], [0, 1])

    def epoch(number, a, b):
        # b is in both samples, so its mean counts both; a only where it is.
        total = total_of(method, terms_of([whole, only_b], sep=[[a, b - 1], [0.0, b + 1]]), W)
        method.end_epoch(number)
        return total.item()

    assert epoch(0, 2.0, 3.0) == 2 * 3 + 2 + 6
    assert epoch(1, 1.0, 3.0) == 2 * 3 + 1 + 6
    assert method.losses == {"a": [2, 1], "b": [3, 3]}
    assert epoch(2, 1.0, 3.0) == pytest.approx(2 * 3 + 0.875647 * 1 + 1.124353 * 6, abs=1e-5)
    assert method.losses == {"a": [1, 1], "b": [3, 3]}
    assert method.figures() == {"lambda": {"a": pytest.approx(1), "b": pytest.approx(1)}}


def test_dwa_keeps_the_losses_of_a_modality_that_an_epoch_lacks():
    method = Dwa(["a", "b"])
    method.losses = {"a": [2.0, 1.0], "b": [3.0, 3.0]}
    total_of(method, terms_of([sample_of([False, True], [0, 1])], sep=[[0.0, 1.5]]), W)
    method.end_epoch(2)
    assert method.losses == {"a": [2.0, 1.0], "b": [3.0, 1.5]}
    method.end_epoch(3)  # a warm-up epoch has no total at all
    assert method.losses == {"a": [2.0, 1.0], "b": [3.0, 1.5]}


def test_dwa_counts_what_the_separate_decoder_had_under_pdt():
    method = Dwa(["a", "b"])
    total_of(method, terms_of([sample_of([True, False], [0, 1])], sep=[[1.0, 2.0]], present=[[True, True]]), W)
    method.end_epoch(0)
    assert method.losses == {"a": [1.0], "b": [2.0]}


# PASSION and its ablations. Two modalities, one sample: dist 0.2 and 0.4, so only the second lags.


def ablation_terms():
    return Terms(
        fuse=torch.tensor([1.0]),
        prm=torch.tensor([2.0]),
        sep=torch.tensor([[3.0, 5.0]]),
        kl=torch.tensor([[7.0, 11.0]]),
        proto=torch.tensor([[13.0, 17.0]]),
        dist=torch.tensor([[0.2, 0.4]]),
        mask=torch.tensor([[True, True]]),
        present=torch.tensor([[True, True]]),
        samples=[],
    )


BETA, MODAL_WEIGHT = torch.tensor([0.5, 2.0]), torch.tensor([1.0, 4.0])

# Each is fuse + prm = 3, then sep, then 0.5 kl, then 0.1 proto.
ABLATIONS = {
    "none": 3 + (3 + 5),
    "passion-pixel": 3 + (1 * 3 + 4 * 5) + 0.5 * (1 * 7 + 4 * 11),
    "passion-semantic": 3 + (1 * 3 + 4 * 5) + 0.1 * (1 * 13 + 4 * 17),
    "passion-both": 3 + (1 * 3 + 4 * 5) + 0.5 * (1 * 7 + 4 * 11) + 0.1 * (1 * 13 + 4 * 17),
    "passion-both-task": 3 + 4 * 5 + 0.5 * (1 * 7 + 4 * 11) + 0.1 * 4 * 17,
    "passion-both-gradient": 3 + (0.5 * 3 + 8 * 5) + 0.5 * (0.5 * 7 + 8 * 11) + 0.1 * (1 * 13 + 4 * 17),
    "passion": 3 + 8 * 5 + 0.5 * (0.5 * 7 + 8 * 11) + 0.1 * 4 * 17,
}


@pytest.mark.parametrize("name", [n for n in METHODS if n == "none" or n.startswith("passion")])
def test_an_ablation_leaves_out_what_its_name_says(name):
    method = build_method(name, ["a", "b"], 2)
    if name != "none":
        method.preference.beta = BETA.double()
    assert total_of(method, ablation_terms(), MODAL_WEIGHT).item() == pytest.approx(ABLATIONS[name])


@pytest.mark.parametrize(
    ("switches", "wanted"),
    [
        (EVERYTHING, 3 + 40 + 45.75 + 6.8),
        (Switches(pixel=False), 3 + 40 + 6.8),
        (Switches(semantic=False), 3 + 40 + 45.75),
        (Switches(task_wise=False), 3 + 41.5 + 45.75 + 8.1),
        (Switches(gradient_wise=False), 3 + 20 + 25.5 + 6.8),
        (Switches(pixel=False, semantic=False, task_wise=False, gradient_wise=False), 3 + 23),
    ],
)
def test_each_switch_alone_takes_its_part_out_of_the_total(switches, wanted):
    assert ablation_terms().passion(BETA, MODAL_WEIGHT, switches).item() == pytest.approx(wanted)


def test_an_ablation_without_gradient_wise_still_follows_beta_for_the_log():
    method = build_method("passion-pixel", ["a", "b"], 2)
    total_of(method, ablation_terms(), MODAL_WEIGHT)
    assert method.end_epoch(0)["dist"] == {"a": pytest.approx(0.2), "b": pytest.approx(0.4)}
    assert method.figures()["beta"]["a"] < 1 < method.figures()["beta"]["b"]


# All of them in the trainer


def test_an_unknown_method_names_the_known_ones():
    with pytest.raises(UserError, match=r"no method 'ogm': choose one of none, passion, .*ogm-ge, pmr, dwa"):
        build_method("ogm", ["a"], 2)


@pytest.fixture(scope="module")
def two_subjects(small_data, tmp_path_factory):
    """The small data with two training subjects, who lack nothing and T1ce."""
    data, split = small_data
    folder = tmp_path_factory.mktemp("two")
    (folder / "train.txt").write_text("".join((split / "train.txt").read_text().splitlines(keepends=True)[:2]))
    (folder / "missingness.csv").write_bytes((split / "missingness.csv").read_bytes())
    return data, folder


def config(small, out, **changes):
    data, split = small
    settings = {"data": data, "split": split, "out": out, "epochs": 1, "device": "cpu", "foreground": 1.0}
    return TrainConfig.model_validate(settings | changes)


def log(out):
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


COMBINATIONS = [(method, "idt") for method in METHODS] + [
    (method, regime) for method in ("none", "passion") for regime in ("idt_drop", "pdt")
]


@pytest.mark.parametrize(("method", "regime"), COMBINATIONS)
def test_every_method_trains(two_subjects, tmp_path, method, regime):
    assert Trainer(config(two_subjects, tmp_path, method=method, regime=regime)).run()
    (record,) = log(tmp_path)
    assert math.isfinite(record["loss"]["total"])
    assert set(record["sep"]) == {"flair", "t1ce", "t1", "t2"}
    for figure in {"ogm-ge": ["coefficient"], "pmr": ["score", "pull"], "dwa": ["lambda"]}.get(method, []):
        assert record[figure]
        assert all(math.isfinite(v) for v in record[figure].values())


@pytest.mark.parametrize(
    ("method", "figure", "neutral"), [("ogm-ge", "coefficient", 1), ("pmr", "pull", 0), ("dwa", "lambda", 1)]
)
def test_a_run_stopped_in_mid_epoch_resumes_exactly(two_subjects, tmp_path, method, figure, neutral):
    settings = {"method": method, "epochs": 3, "learning_rate": 1e-3}
    assert Trainer(config(two_subjects, tmp_path / "straight", **settings)).run()
    # The rule did something, and lambda, which acts in the epoch after, before the stop.
    assert any(value != neutral for value in log(tmp_path / "straight")[1][figure].values())

    def stop(report):
        if (report.epoch, report.step) == (2, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    assert not Trainer(config(two_subjects, tmp_path / "stopped", **settings)).run(stop)
    resumed = Trainer(config(two_subjects, tmp_path / "stopped", **settings), resume=True)
    assert (resumed.state.epoch, resumed.state.step) == (2, 1)
    assert resumed.run()

    for name in ("weights.safetensors", "optimiser.safetensors"):
        ours, theirs = (load_file(tmp_path / run / "checkpoint" / name) for run in ("stopped", "straight"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert log(tmp_path / "stopped") == log(tmp_path / "straight")
    states = [json.loads((tmp_path / run / "checkpoint/resume.json").read_text()) for run in ("stopped", "straight")]
    assert states[0]["method"] == states[1]["method"]
