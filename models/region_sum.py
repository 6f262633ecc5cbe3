"""The sum over regions at the heart of RFNet's fusion, without the maps that its formula would need."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from models.layout import is_channels_last, like, rows, volume


CHUNK = 8192
"""Voxels at a time, whose maps of all regions fit into a core's cache."""


def region_sum(features: Sequence[Tensor], regions: Tensor, weights: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """A 1x1x1 convolution of the concatenated region features p_r * sum_k w_{r,k} f_k, which never exist together.

    features: f_k, P times (B, c, D, H, W); regions: p (B, R, D, H, W), without gradient; weights: w (B, R, P); matrix
    (cout, R * c, 1, 1, 1) and bias (cout,). Gives (B, cout, D, H, W).
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (weights, matrix, *features)):
        y: Tensor = _RegionSum.apply(regions, weights, matrix, bias, *features)
        return y
    if is_channels_last(features[0]):
        return _in_chunks(features, regions, weights, matrix, bias)
    return _region_sum(features, regions, weights, matrix, bias)


def _in_chunks(features: Sequence[Tensor], regions: Tensor, weights: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """`_region_sum` without gradients and channels last: some voxels after the other, which stay in the cache.

    sum_r p_r (sum_k w_{r,k} f_k) M_r: the weights go into the matrices, so that one product gives all regions' maps.
    """
    batch, _, *size = regions.shape
    cout, count = len(matrix), regions.shape[1]
    blocks = matrix.flatten(1).unflatten(1, (count, -1))  # (cout, R, c)
    by_region = torch.einsum("brk,orc->bkcro", weights, blocks).flatten(3).flatten(1, 2)  # (B, P * c, R * cout)
    spread = torch.eye(count, dtype=matrix.dtype, device=matrix.device).repeat_interleave(cout, 1)  # (R, R * cout)
    together = torch.eye(cout, dtype=matrix.dtype, device=matrix.device).repeat(count, 1)  # (R * cout, cout)
    voxels = prod(size)
    out = regions.new_empty(batch, voxels, cout)
    for b in range(batch):
        parts, p = [rows(f[b : b + 1])[0] for f in features], rows(regions[b : b + 1])[0]
        for start in range(0, voxels, CHUNK):
            here = slice(start, start + CHUNK)
            f = torch.cat([part[here] for part in parts], dim=1) if len(parts) > 1 else parts[0][here]
            maps = torch.mm(f, by_region[b]).mul_(torch.mm(p[here], spread))
            torch.addmm(bias, maps, together, out=out[b, here])
    return volume(out, size)


class _RegionSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, regions: Tensor, weights: Tensor, matrix: Tensor, bias: Tensor, *features: Tensor) -> Tensor:
        ctx.save_for_backward(regions, weights, matrix, *features)
        return _region_sum(features, regions, weights, matrix, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        regions, weights, matrix, *features = ctx.saved_tensors
        f = [rows(feature) for feature in features]
        p, g = rows(regions), rows(gradient)
        of_features = [torch.zeros_like(t) for t in f]
        of_weights, of_matrix = torch.empty_like(weights), []
        for r, block in enumerate(matrix.flatten(1).chunk(p.shape[2], dim=1)):
            masked = p[..., r : r + 1] * g
            of_sum = torch.matmul(masked, block)
            summed = _weighted(f, weights[:, r])
            of_matrix.append(torch.matmul(masked.transpose(1, 2), summed).sum(0))
            for k, feature in enumerate(f):
                of_weights[:, r, k] = torch.linalg.vecdot(of_sum.flatten(1), feature.flatten(1))
                of_features[k].addcmul_(of_sum, weights[:, r, k, None, None])
        found = [like(volume(t, gradient.shape[2:]), feature) for t, feature in zip(of_features, features, strict=True)]
        return None, of_weights, torch.cat(of_matrix, dim=1).view_as(matrix), g.sum((0, 1)), *found


def _region_sum(features: Sequence[Tensor], regions: Tensor, weights: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    f, p = [rows(feature) for feature in features], rows(regions)
    total = bias
    for r, block in enumerate(matrix.flatten(1).chunk(p.shape[2], dim=1)):
        total = total + torch.matmul(_weighted(f, weights[:, r]), block.T) * p[..., r : r + 1]
    return like(volume(total, regions.shape[2:]), features[0])


def _weighted(features: Sequence[Tensor], weights: Tensor) -> Tensor:
    """sum_k w_k f_k for features (B, V, c) and weights (B, P)."""
    summed = features[0] * weights[:, 0, None, None]
    for k, feature in enumerate(features[1:], 1):
        summed = torch.addcmul(summed, feature, weights[:, k, None, None])
    return summed
