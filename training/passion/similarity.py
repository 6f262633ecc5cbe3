"""`similarity`: how like each voxel's feature is to the mean feature of each class. Distillation compares such maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models import onednn
from models.layout import in_cache, long_product
from training.passion.losses import Truth, voxels

PROTOTYPE_EPS = 1e-5
COSINE_EPS = 1e-5

Counted = Sequence[int] | Tensor
"""The classes that have prototypes: their indices, or, for a GPU that is not to wait for anyone to look, (C,) with 1
for those and 0 for the others, whose similarities are then computed too and multiplied by 0."""


def similarity(feature: Tensor, truth: Truth, counted: Counted) -> Tensor:
    """Cosine of every voxel's feature with its sample's own class prototypes: (1, F, D, H, W) -> (counted, V), or
    (C, V) where `counted` says so.

    A prototype is the class's mean feature. It is not detached.
    """
    flat = voxels(feature)  # (F, V)
    y, counts = truth.onehot, truth.counts
    if not isinstance(counted, Tensor):
        y, counts = y[list(counted)], counts[list(counted)]
    if flat.device.type == "cpu":
        cosines: Tensor = _Similarity.apply(flat.T, y, counts + PROTOTYPE_EPS)
        return cosines.T
    prototypes = long_product(flat, y) / (counts + PROTOTYPE_EPS)  # (F, counted)
    # Divided by the voxels' norms after the product, which has fewer maps than the feature.
    squares = flat.new_ones(1, len(flat)) @ flat.square()
    return (F.normalize(prototypes, dim=0, eps=COSINE_EPS).T @ flat) / squares.clamp(min=COSINE_EPS**2).sqrt()


class _Similarity(torch.autograd.Function):
    """(V, C) of features f (V, F), classes y (C, V) and their voxels' numbers (C,): chunk by chunk, with a gradient in
    two passes over f.

    s = f u / n with n = |f|, of prototypes u = p / |p|, p = y f / counts. For a gradient g of s, a = g / n:
    f gets a u^T - f sum(g s) / n^2, and y^T (the gradient of y f), which is that of u = a^T f, taken back.
    """

    @staticmethod
    def forward(ctx: Any, f: Tensor, y: Tensor, counts: Tensor) -> Tensor:
        prototypes = torch.matmul(y, f) / counts[:, None]  # (C, F)
        length = prototypes.norm(dim=1, keepdim=True).clamp_(min=COSINE_EPS)
        units, ones = prototypes / length, f.new_ones(1, f.shape[1])
        cosines, norms = f.new_empty(len(f), len(y)), f.new_empty(len(f), 1)
        for part in in_cache(len(f)):
            norms[part] = onednn.product(f[part].square(), ones).clamp_(min=COSINE_EPS**2).sqrt_()
            torch.div(onednn.product(f[part], units), norms[part], out=cosines[part])
        ctx.save_for_backward(f, y, counts, length, units, norms, cosines)
        return cosines

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        f, y, counts, length, units, norms, cosines = ctx.saved_tensors
        classes = len(y)
        of_units, of_lengths = torch.zeros_like(units), torch.empty_like(norms)
        both = f.new_empty(len(f), 2 * classes)  # a, and y^T
        for part in in_cache(len(f)):
            g, n = gradient[part], norms[part]
            a = torch.div(g, n, out=both[part, :classes])
            both[part, classes:] = y[:, part].T
            of_units += a.T @ f[part]
            alike = (g * cosines[part]).sum(1, keepdim=True)
            # A norm that was too small is a constant.
            of_lengths[part] = torch.where(n > COSINE_EPS, alike / n.square(), 0.0)
        along = (of_units * units).sum(1, keepdim=True)
        of_sums = torch.where(length > COSINE_EPS, of_units - units * along, of_units) / (length * counts[:, None])
        matrix, of_f = torch.cat([units, of_sums]).T.contiguous(), torch.empty_like(f)
        for part in in_cache(len(f)):
            torch.addcmul(onednn.product(both[part], matrix), f[part], of_lengths[part], value=-1, out=of_f[part])
        return of_f, None, None
