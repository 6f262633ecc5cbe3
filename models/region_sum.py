"""The sum over regions at the heart of RFNet's fusion, without the maps that its formula would need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.layout import like, long_product, rows, volume
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
    """Of the weights, the matrix and the features."""
    if gradient.is_cuda:
        return _gradients_at_once(gradient, regions, weights, matrix, *features)
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
    return of_weights, torch.cat(of_matrix, dim=1).view_as(matrix), *found


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
