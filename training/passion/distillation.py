"""Self-distillation: the fused path (teacher) teaches the same decoder given one modality alone (student)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.backbone import Fused
from models.layout import long_product
from training.passion.losses import CLAMP, Truth, factors, level_weight, probabilities, voxels

TEMPERATURE = 4.0
PROTOTYPE_EPS = 1e-5
COSINE_EPS = 1e-5


@dataclass(frozen=True)
class SoftTargets:
    """The teacher's tempered probabilities, detached, made once for all students: the output's, then each map's."""

    q: list[Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, teacher: Fused, temperature: float = TEMPERATURE) -> SoftTargets:
        """q = clamp(up(softmax(logits / T)), 0.005, 1) per map, each (C, V)."""
        return cls([p.clamp(CLAMP, 1) for p in _soft(teacher, temperature)])


def _soft(fused: Fused, temperature: float) -> Iterator[Tensor]:
    """Tempered probabilities of the output, then of each map, at full resolution, each (C, V)."""
    yield probabilities(fused.logits, 1, temperature)
    for logits, factor in zip(fused.deep, factors(fused.logits, fused.deep), strict=True):
        yield probabilities(logits, factor, temperature)


def pixel_wise(student: Fused, targets: SoftTargets, temperature: float = TEMPERATURE) -> Iterator[Tensor]:
    """`kl`, in parts to be added up: T^2 mean_{v,c} q_t (log q_t - log q_s) of the output, and of every map, weighted
    by level; scalars."""
    for i, (p, q) in enumerate(zip(_soft(student, temperature), targets.q, strict=True)):
        kl: Tensor = _Divergence.apply(p, q) * temperature**2
        yield kl if i == 0 else kl * level_weight(i - 1)


class _Divergence(torch.autograd.Function):
    """mean of q (log q - log clamp(p, 0.005, 1)), which keeps p and q alone for the gradient of p."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor) -> Tensor:
        ctx.save_for_backward(p, q)
        # Logarithms of q are taken anew for every student: cheaper than as much memory again.
        return q.log().sub_(p.clamp(CLAMP, 1).log_()).mul_(q).mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        p, q = ctx.saved_tensors
        free = (p >= CLAMP) & (p <= 1)
        return torch.where(free, q / p, 0.0).mul_(-gradient / p.numel()), None


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
    prototypes = long_product(flat, y) / (counts + PROTOTYPE_EPS)  # (F, counted)
    # Divided by the voxels' norms after the product, which has fewer maps than the feature.
    squares = flat.new_ones(1, len(flat)) @ flat.square()
    return (F.normalize(prototypes, dim=0, eps=COSINE_EPS).T @ flat) / squares.clamp(min=COSINE_EPS**2).sqrt()


def semantic_wise(student: Tensor, teacher: Tensor, counted: Counted) -> tuple[Tensor, Tensor]:
    """(`proto`, `dist`): mean squared and mean absolute difference of `similarity` maps of the counted classes.

    `dist` only steers the preference, so it carries no gradient.
    """
    difference = student - teacher
    if isinstance(counted, Tensor):
        difference = difference * counted[:, None]
        values = counted.sum().clamp(min=1) * difference.shape[1]
        return difference.square().sum() / values, difference.detach().abs().sum() / values
    return difference.square().mean(), difference.detach().abs().mean()
