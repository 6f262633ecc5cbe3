"""The sum over regions at the heart of RFNet's fusion, without the maps that its formula would need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models import onednn
from models.layout import in_cache, like, long_product, rows, volume
from models.precision import as_wanted, exact


def region_sum(features: Sequence[Tensor], regions: Tensor, weights: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """A 1x1x1 convolution of the concatenated region features p_r * sum_k w_{r,k} f_k, which never exist together.

    features: f_k, P times (B, c, D, H, W); regions: p (B, R, D, H, W), without gradient; weights: w (B, R, P); matrix
    (cout, R * c, 1, 1, 1) and bias (cout,). Gives (B, cout, D, H, W).
    """
    regions, weights, matrix, bias, *features = as_wanted(regions, weights, matrix, bias, *features)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (weights, matrix, *features)):
        y: Tensor = _RegionSum.apply(regions, weights, matrix, bias, *features)
        return y
    return _region_sum(features, regions, weights, matrix, bias)


class _RegionSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, regions: Tensor, weights: Tensor, matrix: Tensor, bias: Tensor, *features: Tensor) -> Tensor:
        ctx.save_for_backward(regions, weights, matrix, *features)
        with exact(matrix.device):
            return _region_sum(features, regions, weights, matrix, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        with exact(gradient.device):
            of_weights, of_matrix, *of_features = _gradients(gradient, *ctx.saved_tensors)
            of_bias = gradient.sum((0, 2, 3, 4)) if ctx.needs_input_grad[3] else None
            return None, of_weights, of_matrix, of_bias, *of_features


def _gradients(gradient: Tensor, regions: Tensor, weights: Tensor, matrix: Tensor, *features: Tensor) -> Any:
    """Of the weights (B, R, P), of the matrix (cout, R * c, 1, 1, 1) and of each feature (B, c, D, H, W), for that of
    the sum, (B, cout, D, H, W)."""
    if gradient.is_cuda:
        return _gradients_at_once(gradient, regions, weights, matrix, *features)
    f, p, g = [rows(feature) for feature in features], rows(regions), rows(gradient)
    count, cout = p.shape[2], g.shape[2]
    blocks = matrix.flatten(1).unflatten(1, (count, -1))  # (cout, R, c)
    spread = torch.eye(count, dtype=p.dtype, device=p.device).repeat_interleave(cout, 1)  # (R, R * cout)
    back = torch.einsum("brk,orc->bkcro", weights, blocks).flatten(3).flatten(1, 2)  # (B, P * c, R * cout)
    of_features = [torch.empty_like(t) for t in f]
    products = torch.zeros_like(back.mT)  # of p_r g and f
    for b in range(len(g)):
        for voxels in in_cache(g.shape[1]):
            masked = g[b, voxels].repeat(1, count).mul_(p[b, voxels] @ spread)
            products[b].addmm_(masked.T, torch.cat([t[b, voxels] for t in f], dim=1))
            of_parts = onednn.product(masked, back[b]).chunk(len(f), dim=1)
            for of_feature, part in zip(of_features, of_parts, strict=True):
                of_feature[b, voxels] = part
    by_block = products.unflatten(1, (count, cout)).unflatten(3, (len(f), -1))
    of_weights = torch.einsum("brokc,orc->brk", by_block, blocks)
    of_matrix = torch.einsum("brokc,brk->orc", by_block, weights).reshape_as(matrix)
    found = [like(volume(t, gradient.shape[2:]), feature) for t, feature in zip(of_features, features, strict=True)]
    return of_weights, of_matrix, *found


def _region_sum(features: Sequence[Tensor], regions: Tensor, weights: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    if regions.is_cuda:
        of_regions, _ = _of_regions(features, regions, weights)
        summed = torch.matmul(matrix.flatten(1), of_regions.flatten(1, 2)) + bias[:, None]
        at_once: Tensor = summed.unflatten(2, regions.shape[2:])
        return at_once
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


def _of_regions(features: Sequence[Tensor], regions: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """p_r * sum_k w_{r,k} f_k as (B, R, c, V), and the features f as (B, P, c * V).

    A GPU has the memory, and does better with a few large products than with many small operations.
    """
    f = torch.stack([feature.flatten(1) for feature in features], dim=1)
    p = regions.flatten(2)[:, :, None]
    return torch.matmul(weights, f).unflatten(2, (-1, p.shape[-1])) * p, f


def _gradients_at_once(gradient: Tensor, regions: Tensor, weights: Tensor, matrix: Tensor, *features: Tensor) -> Any:
    """As `_gradients`."""
    of_regions, f = _of_regions(features, regions, weights)
    g = gradient.flatten(2)
    of_matrix = long_product(g, of_regions.flatten(1, 2)).sum(0).view_as(matrix)
    of_sums = torch.matmul(matrix.flatten(1).T, g).view_as(of_regions) * regions.flatten(2)[:, :, None]
    of_sums = of_sums.flatten(2)
    of_weights = long_product(of_sums, f)
    of_features = torch.matmul(weights.transpose(1, 2), of_sums).unbind(1)
    found = [like(t.view_as(feature), feature) for t, feature in zip(of_features, features, strict=True)]
    return of_weights, of_matrix, *found
