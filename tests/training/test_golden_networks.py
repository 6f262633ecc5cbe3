"""Every backbone and every PASSION loss against the golden figures."""

from itertools import product

import numpy as np
import pytest
import torch
from golden_case import fill_weights, load_case

from models.backbones import build
from models.task import Task
from training.passion.objective import Coefficients, terms
from training.passion.staged import staged

NOISE = 1e-5
"""A convolution bias before an InstanceNorm has a true gradient of 0: what is recorded, and what we get, is the
rounding noise of a sum over all voxels. It stays below this; the number of threads alone changes it by over 1e-6."""


LAYOUTS = {"by channel": torch.contiguous_format, "channels last": torch.channels_last_3d}


def tolerances(backbone: str, layout: str) -> tuple[float, float, float]:
    """Of a probability, absolute, and of a gradient norm, relative, of weights that magnify rounding and of others.

    tests/golden/README.md says where each comes from. M2FTrans magnifies rounding: its golden figures, made channel by
    channel, are up to 1.2e-4 (probabilities) and 3.3e-3 (bottleneck) away from double precision, as a value before a
    LeakyReLU lies within rounding of 0. Whoever does not round as they did needs that much more;
    `test_m2ftrans_is_near_double_precision...` shows it, and holds channels last to less. RFNet's region weights have
    gradients of 1e-3, which large sums leave with their rounding; `test_rfnets_region_weights...` shows it.
    """
    if backbone == "mmformer":
        return 5e-5, 1e-3, 1e-3
    if backbone == "rfnet":
        return 5e-5, 1e-2, 5e-3
    return (5e-5, 1e-3, 5e-2) if layout == "by channel" else (2.5e-4, 5e-3, 5e-2)


def magnifies(key: str) -> bool:
    """Whether a weight is of M2FTrans's bottleneck or one of RFNet's region weights."""
    return key.startswith("Bottleneck.") or key in {"pos", "fusion"} or ".weight_layer." in key


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *product([f"{name}_32_{seed}" for name in ("rfnet", "mmformer", "m2ftrans") for seed in (11, 12)], LAYOUTS),
        # The large ones in one layout, in which each is held to the tighter limits or, of two such, is run.
        pytest.param("rfnet_80_13", "by channel", marks=pytest.mark.slow),
        pytest.param("mmformer_80_13", "channels last", marks=pytest.mark.slow),
        pytest.param("m2ftrans_80_13", "by channel", marks=pytest.mark.slow),
    ],
)
def test_the_network_equals_the_golden_case(name, layout):
    backbone, size, _ = name.split("_")
    case = load_case(name)
    x = case.x.contiguous(memory_format=LAYOUTS[layout])
    want = case.figures
    of_probability, of_magnified, of_others = tolerances(backbone, layout)
    task = Task.load("glioma").model_copy(update={"patch_size": (int(size),) * 3})
    network = build(backbone, task, width=8).eval()
    fill_weights(network)

    with torch.no_grad():
        probs = []
        for b, mask in enumerate(case.masks):
            fused = network.fuse(network.encode(x[b : b + 1], mask), mask)
            probs.append(fused.logits.softmax(1)[0])
        prob = torch.stack(probs)
    s = case.stride
    np.testing.assert_allclose(prob[:, :, ::s, ::s, ::s].numpy(), case.prob, rtol=0, atol=of_probability)
    flat = prob.transpose(0, 1).flatten(1)
    np.testing.assert_allclose(flat.mean(1), want["prob_mean_per_class"], rtol=1e-4)
    np.testing.assert_allclose(flat.std(1), want["prob_std_per_class"], rtol=1e-4)

    beta, modal_weight = torch.tensor(want["beta"]), torch.tensor(want["modal_weight"])

    def weigh(losses):
        return Coefficients.passion(losses.preference(), beta, modal_weight)

    parameters = list(network.parameters())
    got, gradients = staged(network, parameters, x, case.labels, case.masks, 4, weigh)
    for ours, golden in (
        (got.fuse, "fuse_loss"),
        (got.prm, "prm_loss"),
        (got.sep, "sep_loss"),
        (got.kl, "kl_loss"),
        (got.proto, "proto_loss"),
        (got.dist, "dist"),
    ):
        np.testing.assert_allclose(ours.numpy(), want[golden], rtol=1e-4, atol=1e-7, err_msg=golden)
    preference = got.preference()
    np.testing.assert_allclose(preference.numpy(), want["relative_preference"], rtol=0, atol=of_probability / 5)
    assert (preference > 0).tolist() == want["rp_mask"]

    assert got.passion(beta, modal_weight).item() == pytest.approx(want["total_loss"], rel=1e-4)
    errors = {}
    too_far = []
    for i, (key, _) in enumerate(network.named_parameters()):
        ours_norm = gradients[i].norm().item() if i in gradients else 0.0
        golden_norm = want["grad_norm"][key]
        errors[key] = abs(ours_norm - golden_norm) / max(golden_norm, 1e-3)
        if key.endswith(".bias") and 0 < golden_norm < NOISE and ours_norm < NOISE:
            continue
        if errors[key] >= (of_magnified if magnifies(key) else of_others):
            too_far.append(f"{key}: {errors[key]:.2e}")
    assert not too_far
    assert set(errors) == set(want["grad_norm"])


@pytest.mark.parametrize("backbone", ["rfnet", "mmformer", "m2ftrans", "unet"])
def test_both_layouts_compute_the_same(backbone):
    # In double precision, so that no value is near enough to a LeakyReLU's corner for rounding to choose its side.
    case = load_case("rfnet_32_11")
    network = build(backbone, Task.load("glioma").model_copy(update={"patch_size": (32, 32, 32)}), width=8)
    network = network.double().eval()
    found = {}
    for layout, memory_format in LAYOUTS.items():
        x = case.x[1:].double().contiguous(memory_format=memory_format)
        network.zero_grad()
        got = terms(network, x, case.labels[1:], case.masks[1:], classes=4)
        got.passion(torch.ones(4), torch.ones(4)).backward()
        parts = [got.fuse, got.prm, got.sep, got.kl, got.proto, got.dist]
        gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
        found[layout] = [t.detach() for t in (*parts, *gradients)]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "golden_probability", "golden_gradient"),
    [("m2ftrans_32_11", 1.2e-4, 4.2e-4), ("m2ftrans_32_12", 5.6e-5, 3.3e-3)],
)
def test_m2ftrans_is_near_double_precision_which_the_golden_figures_are_not(name, golden_probability, golden_gradient):
    case = load_case(name)
    task = Task.load("glioma").model_copy(update={"patch_size": (32, 32, 32)})
    probabilities, norms = {}, {}
    for dtype in (torch.float32, torch.float64):
        network = build("m2ftrans", task, width=8).eval()
        fill_weights(network)
        network.to(dtype)
        x = case.x.to(dtype).contiguous(memory_format=torch.channels_last_3d)
        got = terms(network, x, case.labels, case.masks, classes=4)
        got.passion(*(torch.tensor(case.figures[key], dtype=dtype) for key in ("beta", "modal_weight"))).backward()
        probabilities[dtype] = torch.cat([sample.teacher.logits.detach().softmax(1).double() for sample in got.samples])
        norms[dtype] = {k: p.grad.norm().item() for k, p in network.named_parameters() if magnifies(k)}

    s = case.stride
    double = probabilities[torch.float64]
    assert np.abs(case.prob - double[:, :, ::s, ::s, ::s].numpy()).max() == pytest.approx(golden_probability, rel=0.1)
    assert off(case.figures["grad_norm"], norms[torch.float64]) == pytest.approx(golden_gradient, rel=0.1)
    torch.testing.assert_close(probabilities[torch.float32].double(), double, rtol=0, atol=1.5e-4)
    assert off(norms[torch.float32], norms[torch.float64]) < 1.5e-3


# With rfnet_80_13, 5.45e-3, it takes minutes; ours are 1.2e-3 off there.
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "golden_gradient"), [("rfnet_32_12", 4.3e-3)])
def test_rfnets_region_weights_carry_the_rounding_of_single_precision(name, golden_gradient):
    case = load_case(name)
    task = Task.load("glioma").model_copy(update={"patch_size": (int(name.split("_")[1]),) * 3})
    norms = {}
    for dtype in (torch.float32, torch.float64):
        network = build("rfnet", task, width=8).eval()
        fill_weights(network)
        network.to(dtype)
        beta, modal_weight = (torch.tensor(case.figures[key], dtype=dtype) for key in ("beta", "modal_weight"))

        def weigh(losses, beta=beta, modal_weight=modal_weight):
            return Coefficients.passion(losses.preference(), beta, modal_weight)

        parameters = list(network.parameters())
        _, gradients = staged(network, parameters, case.x.to(dtype), case.labels, case.masks, 4, weigh)
        keys = [key for key, _ in network.named_parameters()]
        norms[dtype] = {keys[i]: g.norm().item() for i, g in gradients.items() if magnifies(keys[i])}

    assert off(case.figures["grad_norm"], norms[torch.float64]) == pytest.approx(golden_gradient, rel=0.1)
    assert off(norms[torch.float32], norms[torch.float64]) < 6e-3


def off(those, double):
    """Largest relative difference of a gradient norm from double precision, as `tolerances` counts it."""
    return max(abs(those[key] - norm) / max(norm, 1e-3) for key, norm in double.items())
