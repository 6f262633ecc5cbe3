"""Every backbone and every PASSION loss against the golden figures."""

import numpy as np
import pytest
import torch
from golden_case import fill_weights, load_case

from models.backbones import build
from models.task import Task
from training.passion.objective import terms

NOISE = 1e-5
"""A convolution bias before an InstanceNorm has a true gradient of 0: what is recorded, and what we get, is the
rounding noise of a sum over all voxels. It stays below this; the number of threads alone changes it by over 1e-6."""


def gradient_tolerance(backbone: str, key: str) -> float:
    """Relative, of a gradient norm: tests/golden/README.md says where each comes from."""
    if backbone == "m2ftrans":
        return 1e-3 if key.startswith("Bottleneck.") or key in {"pos", "fusion"} else 5e-2
    return {"mmformer": 1e-3, "rfnet": 5e-3}[backbone]


@pytest.mark.parametrize(
    "name",
    [
        "rfnet_32_11",
        "rfnet_32_12",
        "rfnet_80_13",
        "mmformer_32_11",
        "mmformer_32_12",
        pytest.param("mmformer_80_13", marks=pytest.mark.slow),
        "m2ftrans_32_11",
        "m2ftrans_32_12",
        pytest.param("m2ftrans_80_13", marks=pytest.mark.slow),
    ],
)
def test_the_network_equals_the_golden_case(name):
    backbone, size, _ = name.split("_")
    case = load_case(name)
    want = case.figures
    task = Task.load("glioma").model_copy(update={"patch_size": (int(size),) * 3})
    network = build(backbone, task, width=8).eval()
    fill_weights(network)

    with torch.no_grad():
        probs = []
        for b, mask in enumerate(case.masks):
            fused = network.fuse(network.encode(case.x[b : b + 1], mask), mask)
            probs.append(fused.logits.softmax(1)[0])
        prob = torch.stack(probs)
    s = case.stride
    np.testing.assert_allclose(prob[:, :, ::s, ::s, ::s].numpy(), case.prob, rtol=0, atol=5e-5)
    flat = prob.transpose(0, 1).flatten(1)
    np.testing.assert_allclose(flat.mean(1), want["prob_mean_per_class"], rtol=1e-4)
    np.testing.assert_allclose(flat.std(1), want["prob_std_per_class"], rtol=1e-4)

    got = terms(network, case.x, case.labels, case.masks, classes=4)
    for ours, golden in (
        (got.fuse, "fuse_loss"),
        (got.prm, "prm_loss"),
        (got.sep, "sep_loss"),
        (got.kl, "kl_loss"),
        (got.proto, "proto_loss"),
        (got.dist, "dist"),
    ):
        np.testing.assert_allclose(ours.detach().numpy(), want[golden], rtol=1e-4, atol=1e-7, err_msg=golden)
    preference = got.preference()
    np.testing.assert_allclose(preference.numpy(), want["relative_preference"], rtol=0, atol=1e-5)
    assert (preference > 0).tolist() == want["rp_mask"]

    total = got.passion(torch.tensor(want["beta"]), torch.tensor(want["modal_weight"]))
    assert total.item() == pytest.approx(want["total_loss"], rel=1e-4)
    total.backward()
    errors = {}
    too_far = []
    for key, parameter in network.named_parameters():
        ours_norm = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        golden_norm = want["grad_norm"][key]
        errors[key] = abs(ours_norm - golden_norm) / max(golden_norm, 1e-3)
        if key.endswith(".bias") and 0 < golden_norm < NOISE and ours_norm < NOISE:
            continue
        if errors[key] >= gradient_tolerance(backbone, key):
            too_far.append(f"{key}: {errors[key]:.2e}")
    assert not too_far
    assert set(errors) == set(want["grad_norm"])
