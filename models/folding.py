"""Convolutions of narrow volumes at a processor's full width: neighbouring voxels side by side as channels.

A vector register of a CPU holds 16 channels; a convolution to 8 wastes half of every one. Channels last, n voxels along
the last axis with c channels each lie in memory as one voxel with n * c channels does, so that reading them so costs
nothing. n outputs need n + 2 inputs, which is two such voxels: a kernel of 3 x 3 x 2, some of whose weights are 0. What
is multiplied by them is wasted, but less than what folding wins. The sums are the same.
"""

from __future__ import annotations

from torch import Tensor

LANES = 16
"""Channels that a vector register holds, in single precision (AVX-512)."""
MOST = 8


def fold_of(weight: Tensor) -> int:
    """Voxels to put side by side for a 3x3x3 convolution with this weight (cout, cin, 3, 3, 3); 1: leave it."""
    cout, cin = weight.shape[:2]
    if cin == 1 and cout <= LANES // 2:
        return 4  # measured: for one channel, two registers
    fold = 1
    while fold < MOST and fold * cout < LANES:
        fold *= 2
    return fold


def folded_weight(weight: Tensor, fold: int) -> Tensor:
    """(cout, cin, 3, 3, 3) -> (fold * cout, fold * cin, 3, 3, 2): the same convolution of folded volumes."""
    cout, cin = weight.shape[:2]
    folded = weight.new_zeros(fold, cout, fold, cin, 3, 3, 2)
    for out in range(fold):
        for tap in range(3):
            group, place = divmod(out + tap, fold)
            folded[out, :, place, :, :, :, group] = weight[..., tap]
    return folded.view(fold * cout, fold * cin, 3, 3, 2)


def fold(x: Tensor, n: int) -> Tensor:
    """Channels last (B, c, D, H, W) -> a view (B, n * c, D, H, W / n), channels last."""
    return x.movedim(1, -1).unflatten(3, (-1, n)).flatten(4).movedim(-1, 1)


def unfold(x: Tensor, n: int) -> Tensor:
    """The inverse of `fold`."""
    return x.movedim(1, -1).unflatten(4, (n, -1)).flatten(3, 4).movedim(-1, 1)
