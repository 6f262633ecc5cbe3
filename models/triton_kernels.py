"""Kernels for NVIDIA's GPUs, in Triton, for operations that torch spreads over many small ones or does slowly there.

Volumes are (B, c, D, H, W), in either layout of `models.layout`. cuDNN convolves channels last, all else is faster
channel by channel; so padding turns one into the other, and the norm after the convolution turns it back, on the way.
Where there is no Triton, or no C compiler, which it needs, `there` says so, and torch's own operations do the work.
"""

from __future__ import annotations

import inspect
import os
import shutil
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.layout import is_channels_last

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for a CPU comes without
    triton = None

TILE = 8192
"""Values that one program of a kernel has to do with, of a large volume."""
PARTS = 64
"""Tiles whose sums a program reads at a time."""


@cache
def there() -> bool:
    """Whether the kernels can be built here, with their launchers, which are in C and include Python's headers."""
    compiler = os.environ.get("CC")
    found = shutil.which(compiler) if compiler else _any_compiler()
    return triton is not None and found is not None and (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def _any_compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")


def suit(*volumes: Tensor) -> bool:
    """Whether volumes are theirs to compute."""
    # What torch.compile builds is Triton already, and better for being one with what is around it.
    ours = all(x.is_cuda and (x.is_contiguous() or is_channels_last(x)) for x in volumes)
    return ours and not torch.compiler.is_compiling() and there()


def norm_act(x: Tensor, eps: float, slope: float) -> tuple[Tensor, Tensor]:
    """InstanceNorm without affine, then LeakyReLU, of (B, c, D, H, W); and the inverse deviations (B, c) float32.

    What is given comes channel by channel. Sums are in float32, of each part about its own mean.
    """
    plan = _Plan(x)
    means, squares = plan.parts(), plan.parts()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inverse = torch.empty(x.shape[:2], device=x.device)
    _moments[plan.grid](x, means, squares, *plan.sizes, LAST=_last(x), **plan.tile)
    _normalise[plan.grid](
        x, y, means, squares, inverse, *plan.sizes, eps, slope, LAST=_last(x), PARTS=PARTS, **plan.tile
    )  # fmt: skip
    return y, inverse


def norm_act_backward(gradient: Tensor, y: Tensor, inverse: Tensor, slope: float, channels_last: bool) -> Tensor:
    """The gradient of `norm_act`'s input, in the precision of y, from its outputs; in the layout that is said."""
    plan = _Plan(y)
    sums, products = plan.parts(), plan.parts()
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    found = torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=layout)
    _sums[plan.grid](gradient, y, sums, products, *plan.sizes, slope, LAST=_last(gradient), **plan.tile)
    _undo[plan.grid](
        gradient, y, found, sums, products, inverse, *plan.sizes, slope,
        LAST=_last(gradient), FOUND_LAST=_last(found), PARTS=PARTS, **plan.tile,
    )  # fmt: skip
    return found


def padded(parts: Sequence[Tensor], reflect: bool) -> Tensor:
    """The concatenation along channels of volumes (B, c_i, D, H, W), with a voxel more beyond every face: that which
    the face mirrors, or 0. Channels last."""
    batch, _, *size = parts[0].shape
    channels, beyond = sum(p.shape[1] for p in parts), [s + 2 for s in size]
    like, layout = parts[0], torch.channels_last_3d
    whole = torch.empty(batch, channels, *beyond, dtype=like.dtype, device=like.device, memory_format=layout)
    first = 0
    for part in parts:
        plan = _Plan(part, whole[0, 0].numel())
        _pad[plan.grid](
            part, whole, part.shape[1], channels, first, *size, LAST=_last(part), REFLECT=reflect, **plan.tile
        )  # fmt: skip
        first += part.shape[1]
    return whole


def unpadded(gradient: Tensor) -> Tensor:
    """The gradient of reflection by one voxel: (B, c, D + 2, H + 2, W + 2) -> (B, c, D, H, W), channel by channel.

    No axis may have D = 3, whose middle both faces mirror.
    """
    batch, channels, *beyond = gradient.shape
    size = [s - 2 for s in beyond]
    found = torch.empty(batch, channels, *size, dtype=gradient.dtype, device=gradient.device)
    width = size[-1]
    tile = {"VOXELS": min(max(_next_power(width), 16), 128), "CHANNELS": 8 if channels <= 8 else 16, "num_warps": 4}
    blocks = -(-width // tile["VOXELS"])
    grid = (size[0] * size[1] * blocks, -(-channels // tile["CHANNELS"]), batch)
    _unpad[grid](gradient, found, channels, blocks, *size, LAST=_last(gradient), **tile)
    return found


def _next_power(n: int) -> int:
    """The least power of two that is not less."""
    return 1 << (n - 1).bit_length()


class _Plan:
    """How a volume is shared out: in tiles of some voxels with some channels. There are few sizes of them, as a kernel
    is built anew for each."""

    def __init__(self, x: Tensor, voxels: int | None = None) -> None:
        self.batch, self.channels = x.shape[:2]
        voxels = x[0, 0].numel() if voxels is None else voxels
        wide = 8 if self.channels <= 8 else 16
        self.tile = {"VOXELS": TILE // wide, "CHANNELS": wide, "num_warps": 8}
        self.blocks = -(-voxels // self.tile["VOXELS"])
        self.sizes = self.channels, voxels, self.blocks
        self.grid = (self.blocks, -(-self.channels // wide), self.batch)
        self._device = x.device

    def parts(self) -> Tensor:
        return torch.empty(self.batch, self.blocks, self.channels, device=self._device)


def _last(x: Tensor) -> bool:
    """Whether the channels of a voxel lie side by side, where that makes a difference."""
    return not x.is_contiguous()


def _kernel(function: Any) -> Any:
    if triton is None:
        return function
    # Sizes that happen to be 1 or multiples of 16 are no reason to build another one, but those of a volume are, as
    # what is read at a time depends on it.
    sizes = ["channels", "all_channels", "before", "blocks", "depth", "height", "width"]
    return triton.jit(function, do_not_specialize=[n for n in sizes if n in inspect.signature(function).parameters])


# Triton gives a kernel's arguments their types when it is called, so Python's checker finds none.
# A tile is VOXELS x CHANNELS. Its program's axes: the block of voxels, the group of channels, the sample.


@_kernel
def _at(v, c, voxels, channels, LAST: tl.constexpr):  # type: ignore[no-untyped-def]
    if LAST:
        at = v * channels + c
    else:
        at = v + c * voxels
    return at


@_kernel
def _moments(  # type: ignore[no-untyped-def]
    x, means, squares, channels, voxels, blocks, LAST: tl.constexpr, VOXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    block, group, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    v = block * VOXELS + tl.arange(0, VOXELS)[:, None]
    c = group * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = (v < voxels) & (c < channels)
    value = tl.load(x + sample * channels * voxels + _at(v, c, voxels, channels, LAST), mask=inside, other=0.0).to(
        tl.float32
    )
    mean = tl.sum(value, 0) / tl.minimum(voxels - block * VOXELS, VOXELS)
    off = tl.where(inside, value - mean[None, :], 0.0)
    of_part = (sample * blocks + block) * channels + group * CHANNELS + tl.arange(0, CHANNELS)
    known = group * CHANNELS + tl.arange(0, CHANNELS) < channels
    tl.store(means + of_part, mean, mask=known)
    tl.store(squares + of_part, tl.sum(off * off, 0), mask=known)


@_kernel
def _normalise(  # type: ignore[no-untyped-def]
    x, y, means, squares, inverse, channels, voxels, blocks, eps, slope,
    LAST: tl.constexpr, PARTS: tl.constexpr, VOXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    block, group, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    own = group * CHANNELS + tl.arange(0, CHANNELS)
    part, of_parts = tl.arange(0, PARTS)[:, None], sample * blocks * channels + own[None, :]
    mean = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, blocks, PARTS):
        at = first + part
        known = (at < blocks) & (own[None, :] < channels)
        of_part = tl.where(known, tl.minimum(voxels - at * VOXELS, VOXELS), 0).to(tl.float32)
        mean += tl.sum(of_part * tl.load(means + of_parts + at * channels, mask=known, other=0.0), 0)
    mean /= voxels
    square = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, blocks, PARTS):
        at = first + part
        known = (at < blocks) & (own[None, :] < channels)
        of_part = tl.where(known, tl.minimum(voxels - at * VOXELS, VOXELS), 0).to(tl.float32)
        off = tl.load(means + of_parts + at * channels, mask=known, other=0.0) - mean[None, :]
        inner = tl.load(squares + of_parts + at * channels, mask=known, other=0.0)
        square += tl.sum(inner + of_part * off * off, 0)
    scale = 1 / tl.sqrt(square / voxels + eps)
    v = block * VOXELS + tl.arange(0, VOXELS)[:, None]
    c = own[None, :]
    inside = (v < voxels) & (c < channels)
    base = sample * channels * voxels
    value = tl.load(x + base + _at(v, c, voxels, channels, LAST), mask=inside, other=0.0).to(tl.float32)
    value = (value - mean[None, :]) * scale[None, :]
    value = tl.where(value > 0, value, value * slope)
    tl.store(y + base + v + c * voxels, value.to(y.dtype.element_ty), mask=inside)
    if block == 0:
        tl.store(inverse + sample * channels + own, scale, mask=own < channels)


@_kernel
def _sums(  # type: ignore[no-untyped-def]
    gradient, y, sums, products, channels, voxels, blocks, slope,
    LAST: tl.constexpr, VOXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    block, group, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    v = block * VOXELS + tl.arange(0, VOXELS)[:, None]
    c = group * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = (v < voxels) & (c < channels)
    base = sample * channels * voxels
    value = tl.load(y + base + v + c * voxels, mask=inside, other=0.0).to(tl.float32)
    of_value = tl.load(gradient + base + _at(v, c, voxels, channels, LAST), mask=inside, other=0.0).to(tl.float32)
    # LeakyReLU can be undone, so its input, the normalised map, need not be kept.
    of_value = tl.where(value > 0, of_value, of_value * slope)
    value = tl.where(value > 0, value, value / slope)
    of_part = (sample * blocks + block) * channels + group * CHANNELS + tl.arange(0, CHANNELS)
    known = group * CHANNELS + tl.arange(0, CHANNELS) < channels
    tl.store(sums + of_part, tl.sum(of_value, 0), mask=known)
    tl.store(products + of_part, tl.sum(of_value * value, 0), mask=known)


@_kernel
def _undo(  # type: ignore[no-untyped-def]
    gradient, y, found, sums, products, inverse, channels, voxels, blocks, slope,
    LAST: tl.constexpr, FOUND_LAST: tl.constexpr, PARTS: tl.constexpr, VOXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    block, group, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    own = group * CHANNELS + tl.arange(0, CHANNELS)
    part, of_parts = tl.arange(0, PARTS)[:, None], sample * blocks * channels + own[None, :]
    mean = tl.zeros((CHANNELS,), tl.float32)
    product = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, blocks, PARTS):
        at = first + part
        known = (at < blocks) & (own[None, :] < channels)
        mean += tl.sum(tl.load(sums + of_parts + at * channels, mask=known, other=0.0), 0)
        product += tl.sum(tl.load(products + of_parts + at * channels, mask=known, other=0.0), 0)
    mean, product = (mean / voxels)[None, :], (product / voxels)[None, :]
    scale = tl.load(inverse + sample * channels + own, mask=own < channels, other=0.0)[None, :]
    v = block * VOXELS + tl.arange(0, VOXELS)[:, None]
    c = own[None, :]
    inside = (v < voxels) & (c < channels)
    base = sample * channels * voxels
    value = tl.load(y + base + v + c * voxels, mask=inside, other=0.0).to(tl.float32)
    of_value = tl.load(gradient + base + _at(v, c, voxels, channels, LAST), mask=inside, other=0.0).to(tl.float32)
    of_value = tl.where(value > 0, of_value, of_value * slope)
    value = tl.where(value > 0, value, value / slope)
    of_x = (of_value - mean - value * product) * scale
    tl.store(found + base + _at(v, c, voxels, channels, FOUND_LAST), of_x.to(found.dtype.element_ty), mask=inside)


@_kernel
def _pad(  # type: ignore[no-untyped-def]
    x, whole, channels, all_channels, before, depth, height, width,
    LAST: tl.constexpr, REFLECT: tl.constexpr, VOXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    block, group, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    v = block * VOXELS + tl.arange(0, VOXELS)[:, None]
    c = group * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    voxels = (depth + 2) * (height + 2) * (width + 2)
    inside = (v < voxels) & (c < channels)
    i = v // ((width + 2) * (height + 2)) - 1
    j = (v // (width + 2)) % (height + 2) - 1
    k = v % (width + 2) - 1
    if REFLECT:
        there = inside
        i, j, k = tl.abs(i), tl.abs(j), tl.abs(k)
        i = tl.where(i == depth, depth - 2, i)
        j = tl.where(j == height, height - 2, j)
        k = tl.where(k == width, width - 2, k)
    else:
        there = inside & (i >= 0) & (i < depth) & (j >= 0) & (j < height) & (k >= 0) & (k < width)
    of_x = depth * height * width
    source = sample * channels * of_x + _at((i * height + j) * width + k, c, of_x, channels, LAST)
    value = tl.load(x + source, mask=there, other=0.0)
    tl.store(whole + sample * all_channels * voxels + v * all_channels + before + c, value, mask=inside)


@_kernel
def _line(  # type: ignore[no-untyped-def]
    base, i, j, k, c, inside, channels, depth, height, width, LAST: tl.constexpr
):
    """Of a padded volume's line at i, j: the voxels that those at k have become there."""
    of_padded = (depth + 2) * (height + 2) * (width + 2)
    first = (i * (height + 2) + j) * (width + 2)
    value = tl.load(base + _at(first + k + 1, c, of_padded, channels, LAST), mask=inside, other=0.0).to(tl.float32)
    image = first + tl.where(k == 1, 0, width + 1)
    is_there = inside & ((k == 1) | (k == width - 2))
    return value + tl.load(base + _at(image, c, of_padded, channels, LAST), mask=is_there, other=0.0).to(tl.float32)


@_kernel
def _unpad(  # type: ignore[no-untyped-def]
    gradient, found, channels, blocks, depth, height, width,
    LAST: tl.constexpr, VOXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # Here a program's voxels are of one line, which is added to what it has become beyond the faces next to it.
    line, group, sample = tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(2).to(tl.int64)
    k = (tl.program_id(0) % blocks) * VOXELS + tl.arange(0, VOXELS)[:, None]
    c = group * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = (k < width) & (c < channels)
    i, j = line // height, line % height
    base = gradient + sample * channels * (depth + 2) * (height + 2) * (width + 2)
    above, beside = tl.where(i == 1, 0, depth + 1), tl.where(j == 1, 0, height + 1)
    total = _line(base, i + 1, j + 1, k, c, inside, channels, depth, height, width, LAST)
    if (j == 1) | (j == height - 2):
        total += _line(base, i + 1, beside, k, c, inside, channels, depth, height, width, LAST)
    if (i == 1) | (i == depth - 2):
        total += _line(base, above, j + 1, k, c, inside, channels, depth, height, width, LAST)
        if (j == 1) | (j == height - 2):
            total += _line(base, above, beside, k, c, inside, channels, depth, height, width, LAST)
    of_found = depth * height * width
    target = sample * channels * of_found + line * width + k + c * of_found
    tl.store(found + target, total.to(found.dtype.element_ty), mask=inside)
