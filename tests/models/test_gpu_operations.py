"""What a GPU computes with other operations than a CPU is the same: here, on a CPU, one beside the other.

That a GPU itself agrees is what `benchmarks/gpu.py --parts equal` shows, where there is one.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models import layout
from models.backbones import m2ftrans
from models.blocks import _upsampled_by_axis
from models.region_sum import _gradients, _gradients_at_once, _of_regions, _region_sum


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradients(function, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return [y.detach(), *(x.grad for x in leaves)]


def assert_same(ours, plain, *inputs, rtol=1e-9, atol=1e-10):
    for one, other in zip(with_gradients(ours, *inputs), with_gradients(plain, *inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def test_upsampling_axis_by_axis():
    x = random(2, 3, 4, 5, 6).float()
    for factor in (2, 4):
        assert_same(
            lambda x, by=factor: _upsampled_by_axis(x, by),
            lambda x, by=factor: F.interpolate(x, scale_factor=by, mode="trilinear", align_corners=True),
            x, rtol=1e-5, atol=1e-5,
        )  # fmt: skip


def test_a_convolution_with_groups_as_products():
    conv = nn.Conv3d(6, 9, 3, padding=1, groups=3).double()
    assert_same(lambda x: m2ftrans._as_products(conv, x), conv, random(2, 6, 4, 5, 3))


def test_a_long_product_in_parts():
    a, b = random(2, 3, layout.PARTS * 5), random(2, 4, layout.PARTS * 5, seed=1)
    assert_same(layout._product_in_parts, layout.long_product, a, b)


def test_the_sum_over_regions_at_once():
    features = [random(2, 3, 4, 4, 4, seed=k) for k in range(2)]
    regions, weights = random(2, 4, 4, 4, 4, seed=3).softmax(1), random(2, 4, 2, seed=4)
    matrix, bias = random(5, 4 * 3, 1, 1, 1, seed=5), random(5, seed=6)
    of_regions, _ = _of_regions(features, regions, weights)
    at_once = torch.matmul(matrix.flatten(1), of_regions.flatten(1, 2)).unflatten(2, (4, 4, 4))
    one_by_one = _region_sum(features, regions, weights, matrix, bias)
    torch.testing.assert_close(at_once + bias[:, None, None, None], one_by_one)
    gradient = random(*one_by_one.shape, seed=7)
    found = [f(gradient, regions, weights, matrix, *features) for f in (_gradients_at_once, _gradients)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
