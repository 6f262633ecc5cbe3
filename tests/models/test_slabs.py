"""Layers made slab by slab give what plain operations give in double precision."""

import pytest
import torch
import torch.nn.functional as F

from models import onednn, slabs, transformer
from models.convolution import convolve, pointwise
from models.layout import is_channels_last
from models.normalisation import norm_act
from models.transformer import Linear


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    """Several slabs of volumes that a test has time for."""
    monkeypatch.setattr(slabs, "SLAB_BYTES", 2**15)
    monkeypatch.setattr(onednn, "LEAST", 0)
    monkeypatch.setattr(onednn, "LEAST_NUMBERS", 0)


def random(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    # Not `contiguous`: with one channel, torch finds that any tensor is in any layout already.
    return torch.empty_like(x, memory_format=torch.channels_last_3d).copy_(x) if len(shape) == 5 else x


def close(ours, exact):
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("border", ["reflect", "zero"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("cout", [2, 8, 16])
@pytest.mark.parametrize(
    ("batch", "widths", "size"),
    [(1, [1], (6, 8, 16)), (2, [8], (5, 6, 12)), (1, [3, 1, 2], (7, 5, 9)), (1, [8], (2,) * 3)],
)
@torch.no_grad()
def test_convolution(border, stride, cout, batch, widths, size):
    parts = [random(batch, c, *size, seed=k) for k, c in enumerate(widths)]
    weight, bias = random(cout, sum(widths), 3, 3, 3, seed=7), random(cout, seed=8)
    assert slabs.suit(*parts)
    ours = convolve(parts, weight, bias, stride, border)
    mode = {"reflect": "reflect", "zero": "constant"}[border]
    padded = F.pad(torch.cat(parts, 1).double(), (1,) * 6, mode=mode)
    close(ours, F.conv3d(padded, weight.double(), bias.double(), stride))
    assert is_channels_last(ours)


@pytest.mark.parametrize("size", [(4, 6, 16), (3, 5, 7)])
@pytest.mark.parametrize(("widths", "cout"), [([8], 8), ([2, 3], 4), ([16, 8], 4), ([40], 2)])
@torch.no_grad()
def test_pointwise_convolution(widths, cout, size):
    parts = [random(2, c, *size, seed=k) for k, c in enumerate(widths)]
    weight, bias = random(cout, sum(widths), 1, 1, 1, seed=7), random(cout, seed=8)
    exact = F.conv3d(torch.cat(parts, 1).double(), weight.double(), bias.double())
    close(pointwise(parts, weight, bias), exact)


@pytest.mark.parametrize("size", [(2, 2, 2), (9, 13, 11), (16, 24, 20)])
@torch.no_grad()
def test_norm_and_activation_far_from_zero_and_unlike_from_slab_to_slab(size):
    x = random(2, 3, *size) * 2 + 30 + torch.linspace(-20, 20, size[0])[:, None, None]
    close(norm_act(x), F.leaky_relu(F.instance_norm(x.double(), eps=slabs.EPS), slabs.SLOPE))


@torch.no_grad()
def test_a_channel_that_is_the_same_everywhere_gives_zero():
    x = torch.full((1, 2, 17, 16, 16), 3.0).contiguous(memory_format=torch.channels_last_3d)
    assert not norm_act(x).any()


@torch.no_grad()
def test_the_sum_over_regions():
    features = [random(2, 3, 6, 7, 20, seed=k) for k in range(2)]
    regions = random(2, 4, 6, 7, 20, seed=9).softmax(1)
    weights, matrix, bias = random(2, 4, 2, seed=5), random(6, 12, 1, 1, 1, seed=6), random(6, seed=7)
    made = slabs.region_sum(features, regions, weights, matrix, bias)
    summed = [sum(weights[:, r, k, None, None, None, None] * f for k, f in enumerate(features)) for r in range(4)]
    maps = torch.cat([regions[:, r : r + 1] * s for r, s in enumerate(summed)], 1)
    close(slabs.joined(made, (2, 6, 6, 7, 20)), F.conv3d(maps.double(), matrix.double(), bias.double()))


@torch.no_grad()
def test_linear_layers():
    layer, x = Linear(24, 40), random(2, 5, 24)
    close(layer(x), F.linear(x.double(), layer.weight.double(), layer.bias.double()))
    close(onednn.linear(x, layer.weight, None), F.linear(x.double(), layer.weight.double()))


def gradients_equal(ours, exact, *inputs):
    """Of a sum that weighs every output differently, by every input."""
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    g = torch.linspace(-1, 1, ours.numel()).view(ours.shape)
    for one, other in zip(
        torch.autograd.grad(ours, inputs, g), torch.autograd.grad(exact, inputs, g.double()), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("widths", "cout"), [([8], 8), ([2, 3], 4), ([16, 8, 1], 16)])
def test_gradients_of_pointwise_convolutions(widths, cout):
    parts = [random(2, c, 4, 6, 16, seed=k).requires_grad_() for k, c in enumerate(widths)]
    weight, bias = (random(*shape, seed=7).requires_grad_() for shape in ((cout, sum(widths), 1, 1, 1), (cout,)))

    def exact():
        return F.conv3d(torch.cat(parts, 1).double(), weight.double(), bias.double())

    made = pointwise(parts, weight, bias)
    assert type(made.grad_fn).__name__ == "_PointwiseBackward"
    gradients_equal(made, exact(), weight, bias, *parts)
    of_weight = torch.autograd.grad(pointwise([p.detach() for p in parts], weight, bias).sum(), weight)[0]
    torch.testing.assert_close(of_weight, torch.autograd.grad(exact().sum(), weight)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_large_linear_layers(bias, monkeypatch):
    monkeypatch.setattr(transformer, "LARGE", 0)
    layer, x = Linear(24, 40, bias=bias), random(2, 5, 24).requires_grad_()
    made = layer(x)
    assert type(made.grad_fn).__name__ == "_LinearBackward"
    parameters = list(layer.parameters())
    gradients_equal(made, F.linear(x.double(), *(p.double() for p in parameters)), x, *parameters)


def test_with_gradients_nothing_is_made_here():
    assert not slabs.suit(random(1, 2, 4, 4, 4))
    with torch.no_grad():
        assert slabs.suit(random(1, 2, 4, 4, 4))
        assert not slabs.suit(random(1, 2, 4, 4, 4).contiguous())
        assert not slabs.suit(random(1, 2, 4, 4, 4).double())
        with torch.autocast("cpu", torch.bfloat16):
            assert not slabs.suit(random(1, 2, 4, 4, 4))
