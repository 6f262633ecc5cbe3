"""Self-distillation: the fused path (teacher) teaches the same decoder given one modality alone (student)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.backbone import Fused
from training.passion.losses import CLAMP, factors, level_weight, probabilities
from training.passion.similarity import Counted

TEMPERATURE = 4.0


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
