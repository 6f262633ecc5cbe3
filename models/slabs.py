"""Inference on a CPU, slab by slab: what is made of some planes is used while the processor's cache still has it.

A layer without gradients need keep nothing. Its volume (B, c, D, H, W), channels last, is made in slabs: matrices
(n, c) of n voxels each. Every function here that makes them yields them in order, and `joined` or `norm_act` puts them
together. The sums are those of `models.convolution`, `models.normalisation` and `models.region_sum`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import gcd, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from models import folding, onednn
from models.layout import volume

SLOPE = 0.2
EPS = 1e-5
SLAB_BYTES = 2**21
"""Of a slab's padded input: with what is made of it, about what a core's caches hold."""


def suit(*inputs: Tensor) -> bool:
    """Whether a layer of these can be made here: without gradients, and where oneDNN's operations `fit`."""
    return not torch.is_grad_enabled() and onednn.fit(*inputs)


def joined(slabs: Iterable[Tensor], shape: Sequence[int]) -> Tensor:
    """The slabs of a volume as that volume, of `shape` (B, c, D, H, W)."""
    out, at = _empty(shape), 0
    matrix = out.view(-1, shape[1])
    for slab in slabs:
        matrix[at : at + len(slab)] = slab
        at += len(slab)
    return volume(out, shape[2:])


def plus(slabs: Iterable[Tensor], x: Tensor) -> Iterator[Tensor]:
    """The slabs of a volume, to which x (B, c, D, H, W) is added."""
    matrix, at = _matrix(x), 0
    for slab in slabs:
        yield slab.add_(matrix[at : at + len(slab)])
        at += len(slab)


def norm_act(slabs: Iterable[Tensor], shape: Sequence[int], then_plus: Tensor | None = None) -> Tensor:
    """InstanceNorm without affine, then LeakyReLU(0.2), of the volume of `shape` (B, c, D, H, W) that slabs are of.

    What is given as `then_plus`, of the same shape, is added to it at the end. No slab may hold voxels of two samples.
    """
    out, voxels, at = _empty(shape), prod(shape[2:]), 0
    matrix, of_sample = out.view(-1, shape[1]), _Moments(voxels)
    addend = None if then_plus is None else _matrix(then_plus)
    for slab in slabs:
        of_sample.add(slab)
        if of_sample.whole:
            scale, shift = of_sample.scale_and_shift()
            for wide in of_sample.slabs:
                there = slice(at, at + wide.numel() // shape[1])
                place = matrix[there].view(wide.shape)
                torch.addcmul(shift.of(wide), wide, scale.of(wide), out=place)
                F.leaky_relu_(place, SLOPE)
                if addend is not None:
                    place.add_(addend[there].view(wide.shape))
                at = there.stop
            of_sample = _Moments(voxels)
    return volume(out, shape[2:])


class _Spread:
    """A value per channel, (c,), for the columns of matrices by `_wide`."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._of: dict[int, Tensor] = {}

    def of(self, wide: Tensor) -> Tensor:
        width = wide.shape[1]
        if width not in self._of:
            self._of[width] = self.values.repeat(width // len(self.values))
        return self._of[width]


class _Moments:
    """Mean and variance per channel of a sample's voxels, summed up slab by slab.

    Around the first slab's mean, which is the mean of a share of all voxels: so the squares' sum loses no digits.
    """

    def __init__(self, voxels: int) -> None:
        self.slabs: list[Tensor] = []
        """By `_wide`."""
        self._voxels = voxels
        self._left = voxels
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def whole(self) -> bool:
        return self._left == 0

    def add(self, slab: Tensor) -> None:
        wide = _wide(slab)
        if not self.slabs:
            self._about = _Spread(wide.sum(0).view(-1, slab.shape[1]).sum(0) / len(slab))
        off = wide - self._about.of(wide)
        of_off, of_squares = off.sum(0), off.square_().sum(0)
        if wide.shape[1] in self._sums:
            of_off += self._sums[wide.shape[1]][0]
            of_squares += self._sums[wide.shape[1]][1]
        self._sums[wide.shape[1]] = of_off, of_squares
        self.slabs.append(wide)
        self._left -= len(slab)

    def scale_and_shift(self) -> tuple[_Spread, _Spread]:
        """What a value is multiplied by, and what is added then, to have mean 0 and variance 1."""
        about = self._about.values
        of_off, of_squares = (
            torch.stack([s.view(-1, len(about)).sum(0) for s in sums]).sum(0) / self._voxels
            for sums in zip(*self._sums.values(), strict=True)
        )
        variance = (of_squares - of_off.square()).clamp_min(0)
        scale = (variance + EPS).rsqrt()
        return _Spread(scale), _Spread(-(about + of_off) * scale)


def of_volume(x: Tensor) -> Iterator[Tensor]:
    """The slabs of x (B, c, D, H, W): views."""
    for (slab,) in _chunks([x], x.shape[1]):
        yield slab


def convolve(parts: Sequence[Tensor], weight: Tensor, bias: Tensor, stride: int, reflect: bool) -> Iterator[Tensor]:
    """As `models.convolution.convolve`."""
    batch, _, *(depth, height, width) = parts[0].shape
    (cout, cin), n = weight.shape[:2], folding.fold(weight, stride, width)
    folded, bias = (folding.folded(weight, n), bias.repeat(n)) if n > 1 else (weight, bias)
    beyond = folding.padding(n)
    planes = max(SLAB_BYTES // (4 * cin * (height + 2) * (width + beyond) * stride), 1)
    sources = [part.movedim(1, -1) for part in parts]
    # The last columns of a folded volume meet weights of 0 only; what never was written might be NaN.
    padded = parts[0].new_zeros((planes - 1) * stride + 3, height + 2, width + beyond, cin)
    for sample in range(batch):
        for start in range(0, -(-depth // stride), planes):
            count = min(planes, -(-depth // stride) - start)
            into = padded[: (count - 1) * stride + 3]
            _pad([source[sample] for source in sources], into, start * stride - 1, reflect)
            x = folding.side_by_side(into.movedim(-1, 0)[None], n)
            # Not `conv3d`: of small volumes it makes a convolution of its own, several times slower.
            y = torch.ops.aten.mkldnn_convolution(x, folded, bias, [0] * 3, [stride] * 3, [1] * 3, 1)
            yield y.movedim(1, -1).reshape(-1, cout)


def pointwise(parts: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Iterator[Tensor]:
    """As `models.convolution.pointwise`."""
    cout, cin = weight.shape[:2]
    for chunk in _chunks(parts, max(cin, cout)):
        yield onednn.linear(chunk[0] if len(chunk) == 1 else torch.cat(chunk, dim=1), weight.flatten(1), bias)


def region_sum(
    features: Sequence[Tensor], regions: Tensor, weights: Tensor, matrix: Tensor, bias: Tensor
) -> Iterator[Tensor]:
    """As `models.region_sum.region_sum`: sum_r p_r (sum_k w_{r,k} f_k) M_r.

    The weights go into the matrices, so that one product of matrices gives all regions' maps.
    """
    cout, count = len(matrix), regions.shape[1]
    blocks = matrix.flatten(1).unflatten(1, (count, -1))  # (cout, R, c)
    of_sample = torch.einsum("brk,orc->bkcro", weights, blocks).flatten(3).flatten(1, 2)  # (B, P * c, R * cout)
    spread = torch.eye(count).repeat_interleave(cout, 1)  # (R, R * cout)
    together = torch.eye(cout).repeat(count, 1)  # (R * cout, cout)
    p, voxels, done = regions.flatten(2), prod(regions.shape[2:]), 0
    for chunk in _chunks(features, sum(f.shape[1] for f in features) + 2 * count * cout):
        sample, at = divmod(done, voxels)
        maps = onednn.linear(torch.cat(chunk, dim=1), of_sample[sample].T, None)
        maps *= torch.mm(p[sample, :, at : at + len(maps)].T, spread)
        done += len(maps)
        yield onednn.linear(maps, together.T, bias)


def _chunks(volumes: Sequence[Tensor], channels: int) -> Iterator[list[Tensor]]:
    """The same voxels of every volume, as matrices (n, c): some thousand of one sample at a time."""
    matrices, voxels = [_matrix(v) for v in volumes], prod(volumes[0].shape[2:])
    most = max(SLAB_BYTES // (4 * channels) // 64 * 64, 64)
    for start in range(0, len(matrices[0]), voxels):
        for at in range(start, start + voxels, most):
            yield [m[at : min(at + most, start + voxels)] for m in matrices]


def _pad(sources: Sequence[Tensor], into: Tensor, start: int, reflect: bool) -> None:
    """Fills `into` (planes, H + 2, W + 2 or more, sum of c_i) from volumes (D, H, W, c_i), side by side.

    Its first plane is their plane `start`, which may be -1.
    """
    depth, height, width, _ = sources[0].shape
    low, high = max(start, 0), min(start + len(into), depth)
    at = 0
    for source in sources:
        place = into[low - start : high - start, 1 : height + 1, 1 : width + 1, at : at + source.shape[3]]
        place.copy_(source[low:high])
        at += source.shape[3]
    faces = [(into[:, 0], into[:, 2]), (into[:, height + 1], into[:, height - 1])]
    faces += [(into[:, :, 0], into[:, :, 2]), (into[:, :, width + 1], into[:, :, width - 1])]
    if start < 0:
        faces.append((into[0], into[2]))
    if start + len(into) > depth:
        faces.append((into[-1], into[-3]))
    for face, inner in faces:
        if reflect:
            face.copy_(inner)
        else:
            face.zero_()


def _empty(shape: Sequence[int]) -> Tensor:
    """(B, V, c) for a volume of `shape` (B, c, D, H, W)."""
    return torch.empty(shape[0], prod(shape[2:]), shape[1])


def _matrix(x: Tensor) -> Tensor:
    """(B, c, D, H, W), channels last, as (B * V, c): a view."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _wide(slab: Tensor) -> Tensor:
    """(n, c) with several voxels to a row, which is as long as vector instructions want it: a view."""
    return slab.view(-1, gcd(len(slab), 64) * slab.shape[1])
