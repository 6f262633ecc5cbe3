"""Memory layouts of volumes (B, c, D, H, W): channel by channel, or channels last, voxel by voxel.

Every block takes both and keeps to that of its input, so the input of a network decides. On a CPU channels last is the
faster one: oneDNN's gradients need no reordering, and upsampling and the matrix products of 1x1x1 convolutions read
memory in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

IN_CACHE = 2**14
"""Voxels."""
PARTS = 64
"""Of voxels, that are multiplied side by side."""


def in_fast_layout(x: Tensor) -> Tensor:
    """The input of a network, (B, K, D, H, W), in the layout that its device is faster with."""
    on_cpu = x.device.type in {"cpu", "meta"}  # `meta`: what is computed without data is computed for a CPU
    return x.contiguous(memory_format=torch.channels_last_3d) if on_cpu else x


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a voxel of (B, c, D, H, W) lie side by side in memory."""
    # With one channel both layouts are the same, but for the strides.
    return x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last_3d)


def like(x: Tensor, other: Tensor) -> Tensor:
    """x in the layout of `other`: itself, or a copy."""
    return x.contiguous(memory_format=torch.channels_last_3d if is_channels_last(other) else torch.contiguous_format)


def channel(x: Tensor, k: int) -> Tensor:
    """One channel of x (B, K, D, H, W), dense and in the layout of x: (B, 1, D, H, W)."""
    one = x[:, k : k + 1]
    if not is_channels_last(x):
        return one.contiguous()
    # Not `contiguous`: with one channel, torch finds that any tensor is in any layout already.
    dense = torch.empty(one.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    return dense.copy_(one)


def rows(x: Tensor) -> Tensor:
    """(B, c, D, H, W) -> (B, V, c): a view where x is channels last, else a copy."""
    return x.movedim(1, -1).flatten(1, 3)


def voxels(x: Tensor) -> Tensor:
    """(B, c, D, H, W) -> (B, c, V), a view in either layout."""
    return rows(x).transpose(1, 2) if is_channels_last(x) else x.flatten(2)


def volume(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `rows`: (B, V, c) -> (B, c, D, H, W), channels last, with `shape` = (D, H, W)."""
    volumes: Tensor = x.unflatten(1, tuple(shape)).movedim(-1, 1)
    return volumes


def in_cache(number: int) -> Iterator[slice]:
    """`number` voxels in turn, as many at a time as leave what is made of them in a processor's cache."""
    for start in range(0, number, IN_CACHE):
        yield slice(start, start + IN_CACHE)


def long_product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of (..., m, V) and (..., n, V) -> (..., m, n), where V are voxels, far more than m and n."""
    number = a.shape[-1]
    if a.is_cuda and number % PARTS == 0 and number >= PARTS**2:
        return _product_in_parts(a, b)
    return torch.matmul(a, b.transpose(-2, -1))


def _product_in_parts(a: Tensor, b: Tensor) -> Tensor:
    """As `long_product`. Of one such product a GPU's library makes work for few of its processors."""
    a, b = (x.unflatten(-1, (PARTS, -1)).transpose(-3, -2) for x in (a, b))
    return torch.matmul(a, b.transpose(-2, -1)).sum(-3)
