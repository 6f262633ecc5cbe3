"""Convolutions of few channels with neighbouring voxels side by side, on a CPU.

A vector register holds `LANES` channels, and a convolution to 8 wastes half of it. Channels last, n voxels along the
last axis with c channels each lie in memory as one voxel with n * c channels does. n outputs need n + 2 inputs, two
such voxels: a kernel of 3 x 3 x 2 with some weights 0.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

LANES = 16
"""Numbers in single precision that a vector register holds (AVX-512)."""


def fold(weight: Tensor, stride: int, width: int) -> int:
    """Voxels to put side by side, along an axis of `width` outputs; 1: none."""
    cout, cin = weight.shape[:2]
    if stride > 1:
        return 1
    n = 1
    # One channel's kernel is so small that even two registers pay.
    while n * cout < (2 * LANES if cin == 1 else LANES) and width % (2 * n) == 0 and n < 8:
        n *= 2
    return n


def padding(n: int) -> int:
    """What the last axis of a volume has beyond its outputs: a voxel on either side, and what fills the last group.
    That meets weights of 0 only, but must be a number."""
    return max(n, 2)


def folded(weight: Tensor, n: int) -> Tensor:
    """(cout, cin, 3, 3, 3) -> (n * cout, n * cin, 3, 3, 2): the same convolution of n voxels side by side."""
    cout, cin = weight.shape[:2]
    wide = weight.new_zeros(n, cout, n, cin, 3, 3, 2)
    for out, place, group, tap in _places(n):
        wide[out, :, place, :, :, :, group] = weight[..., tap]
    return wide.view(n * cout, n * cin, 3, 3, 2)


def unfolded(gradient: Tensor, n: int) -> Tensor:
    """The gradient of a weight from that of the weight `folded`."""
    wide = gradient.unflatten(1, (n, -1)).unflatten(0, (n, -1))  # (n, cout, n, cin, 3, 3, 2)
    found = gradient.new_zeros(wide.shape[1], wide.shape[3], 3, 3, 3)
    for out, place, group, tap in _places(n):
        found[..., tap] += wide[out, :, place, :, :, :, group]
    return found


def side_by_side(x: Tensor, n: int) -> Tensor:
    """(B, c, D, H, W), channels last, as (B, n * c, D, H, W / n): a view."""
    y: Tensor = x.movedim(1, -1).unflatten(3, (-1, n)).flatten(4).movedim(-1, 1)
    return y


def apart(x: Tensor, n: int) -> Tensor:
    """The inverse of `side_by_side`."""
    y: Tensor = x.movedim(1, -1).unflatten(4, (n, -1)).flatten(3, 4).movedim(-1, 1)
    return y


def _places(n: int) -> Iterator[tuple[int, int, int, int]]:
    """Of a kernel's taps along the last axis: output among n, input among n, the first or the second n, tap."""
    for out in range(n):
        for tap in range(3):
            group, place = divmod(out + tap, n)
            yield out, place, group, tap
