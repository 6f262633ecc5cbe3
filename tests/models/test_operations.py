"""The operations under the layers give what plain ones give, forward and backward, in either memory layout."""

import pytest
import torch
import torch.nn.functional as F

from models.convolution import _fold, convolve, pointwise
from models.layout import channel, in_fast_layout, is_channels_last, like, rows, volume
from models.normalisation import EPS, SMALL, norm_act
from models.precision import arithmetic
from models.region_sum import region_sum

LAYOUTS = {"by channel": torch.contiguous_format, "channels last": torch.channels_last_3d}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def random(*shape, seed=0, layout=torch.contiguous_format):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.contiguous(memory_format=layout) if len(shape) == 5 else x


def agree(ours, plain, *inputs):
    """Both functions give the same of inputs, and the same gradients; nothing is asked of gradients without a need."""
    results = []
    for function in (ours, plain):
        leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
        y = function(*leaves)
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        with torch.no_grad():
            without = function(*(t.detach() for t in leaves))
        results.append([y.detach(), without, *(t.grad for t in leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@layouts
@pytest.mark.parametrize("border", ["reflect", "zero"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("batch", "widths", "size"),
    [
        (1, [3], (6, 4, 4)),  # small: two halves
        (1, [2, 3], (5, 4, 6)),  # and an odd depth: they share a row
        (1, [4], (2, 2, 4)),
        (2, [3, 1, 2], (4, 6, 4)),
        (1, [40, 24], (20, 16, 4)),  # more than 20480 values in the first planes: whole
    ],
)
def test_convolution(layout, border, stride, batch, widths, size):
    parts = [random(batch, c, *size, seed=c, layout=layout) for c in widths]
    weight, bias = random(5, sum(widths), 3, 3, 3, seed=7), random(5, seed=8)

    def plain(w, b, *p):
        mode = {"reflect": "reflect", "zero": "constant"}[border]
        return F.conv3d(F.pad(torch.cat(p, 1), (1,) * 6, mode=mode), w, b, stride)

    agree(lambda w, b, *p: convolve(p, w, b, stride, border), plain, weight, bias, *parts)
    assert is_channels_last(convolve(parts, weight, bias, stride, border)) == is_channels_last(parts[0])


@layouts
@pytest.mark.parametrize(("batch", "widths"), [(1, [3]), (2, [4, 1, 2])])
def test_pointwise_convolution(layout, batch, widths):
    parts = [random(batch, c, 3, 4, 5, seed=c, layout=layout) for c in widths]
    weight, bias = random(6, sum(widths), 1, 1, 1, seed=7), random(6, seed=8)
    agree(lambda w, b, *p: pointwise(p, w, b), lambda w, b, *p: F.conv3d(torch.cat(p, 1), w, b), weight, bias, *parts)


@layouts
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", [(2, 2, 2), (17, 16, 16), (16, 24, 20)])
def test_norm_and_activation(layout, batch, size):
    x = random(batch, 3, *size, layout=layout) * 3 + 5
    agree(norm_act, lambda t: F.leaky_relu(F.instance_norm(t, eps=1e-5), 0.2), x)
    assert is_channels_last(norm_act(x)) == is_channels_last(x)


def test_a_channel_that_is_the_same_everywhere_gives_zero_and_no_nan():
    x = torch.full((1, 2, 17, 16, 16), 3.0).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    y = norm_act(x)
    y.sum().backward()
    assert not y.any()
    assert x.grad.isfinite().all()


@layouts
def test_the_norm_of_a_large_map_is_exact_to_single_precision(layout):
    exact = random(1, 4, 40, 40, 40) * 2 + 30
    single = exact.float().contiguous(memory_format=layout)
    want = F.leaky_relu(F.instance_norm(single.double(), eps=EPS), 0.2)
    assert exact[0, 0].numel() > SMALL
    assert (norm_act(single) - want).abs().max() < 2e-5


@layouts
@pytest.mark.parametrize("batch", [1, 2])
def test_the_sum_over_regions(layout, batch):
    features = [random(batch, 3, 4, 3, 5, seed=k, layout=layout) for k in range(2)]
    regions = random(batch, 4, 4, 3, 5, seed=9, layout=layout).softmax(1)
    weights, matrix, bias = random(batch, 4, 2, seed=5), random(6, 12, 1, 1, 1, seed=6), random(6, seed=7)

    def plain(w, m, b, *f):
        summed = [sum(w[:, r, k, None, None, None, None] * f_k for k, f_k in enumerate(f)) for r in range(4)]
        maps = torch.cat([regions[:, r : r + 1] * s for r, s in enumerate(summed)], 1)
        return F.conv3d(maps, m, b)

    agree(lambda w, m, b, *f: region_sum(f, regions, w, m, b), plain, weights, matrix, bias, *features)


def test_layouts():
    x = in_fast_layout(torch.arange(2 * 3 * 2 * 4 * 5.0).view(2, 3, 2, 4, 5))
    assert is_channels_last(x)
    one = channel(x, 1)
    assert torch.equal(one, x[:, 1:2])
    assert is_channels_last(one)  # though torch takes it for either
    assert torch.equal(volume(rows(x), x.shape[2:]), x)
    assert rows(x).data_ptr() == x.data_ptr()
    plain = x.contiguous()
    assert not is_channels_last(plain)
    assert not is_channels_last(channel(plain, 1))
    assert is_channels_last(like(plain, x))
    assert not is_channels_last(like(x, plain))


@pytest.mark.parametrize(("width", "out"), [(1, 8), (8, 8), (5, 4)])
def test_a_convolution_of_voxels_side_by_side(width, out):
    """In single precision, in which it is used: few outputs, and a volume that is large enough for oneDNN."""
    x = random(1, max(width, 2), 74, 74, 8, layout=torch.channels_last_3d).float()
    x = channel(x, 0) if width == 1 else x
    weight, bias = random(out, width, 3, 3, 3, seed=1).float(), random(out, seed=2).float()
    assert _fold([x], weight, 1) > 1
    found = []
    for function in (
        lambda x, w, b: convolve([x], w, b),
        lambda x, w, b: F.conv3d(F.pad(x, (1,) * 6, mode="reflect"), w, b),
    ):
        precise = torch.double if found else torch.float
        leaves = [
            t.detach().to(precise, memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)
        ]
        y = function(*leaves)
        (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
        found.append([y.detach(), *(t.grad for t in leaves)])
    assert is_channels_last(found[0][0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-5 * other.abs().max().item())


def test_a_scan_itself_is_convolved_in_single_precision_at_inference():
    scan, weight, bias = random(1, 1, 6, 6, 6).float(), random(2, 1, 3, 3, 3, seed=1).float(), random(2, seed=2).float()
    exact = convolve([scan], weight, bias)
    with arithmetic("bfloat16", scan.device):
        with torch.inference_mode():
            assert torch.equal(convolve([scan], weight, bias), exact)
            assert convolve([exact], random(2, 2, 3, 3, 3).float(), bias).dtype == torch.bfloat16
        assert convolve([scan], weight.requires_grad_(), bias).dtype == torch.bfloat16  # in training
