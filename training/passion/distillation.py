"""Self-distillation: the fused path (teacher) teaches the same decoder given one modality alone (student)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.backbone import Fused
from training.passion.losses import CLAMP, Truth, factors, level_weight, probabilities

TEMPERATURE = 4.0
PROTOTYPE_EPS = 1e-5
COSINE_EPS = 1e-5


@dataclass(frozen=True)
class SoftTargets:
    """The teacher's tempered probabilities, detached, made once for all students: the output's, then each map's."""

    q: list[Tensor]
    log_q: list[Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, teacher: Fused, temperature: float = TEMPERATURE) -> SoftTargets:
        """q = clamp(up(softmax(logits / T)), 0.005, 1) per map, each (C, V)."""
        q = _soft(teacher, temperature)
        return cls(q, [m.log() for m in q])


def _soft(fused: Fused, temperature: float) -> list[Tensor]:
    maps = [probabilities(fused.logits, 1, temperature)]
    for logits, factor in zip(fused.deep, factors(fused.logits, fused.deep), strict=True):
        maps.append(probabilities(logits, factor, temperature))
    return [m.clamp(CLAMP, 1) for m in maps]


def pixel_wise(student: Fused, targets: SoftTargets, temperature: float = TEMPERATURE) -> Tensor:
    """`kl`: T^2 mean_{v,c} q_t (log q_t - log q_s) of the output plus, level-weighted, of every map; a scalar."""
    terms = []
    for i, q_s in enumerate(_soft(student, temperature)):
        kl = (targets.q[i] * (targets.log_q[i] - q_s.log())).mean() * temperature**2
        terms.append(kl if i == 0 else kl * level_weight(i - 1))
    return torch.stack(terms).sum()


def similarity(feature: Tensor, truth: Truth, counted: Sequence[int]) -> Tensor:
    """Cosine of every voxel's feature with its sample's own class prototypes: (1, F, D, H, W) -> (counted, V).

    A prototype is the class's mean feature. It is not detached.
    """
    flat = feature[0].flatten(1)  # (F, V)
    y = truth.onehot[list(counted)]
    prototypes = flat @ y.T / (truth.counts[list(counted)] + PROTOTYPE_EPS)  # (F, counted)
    return F.normalize(prototypes, dim=0, eps=COSINE_EPS).T @ F.normalize(flat, dim=0, eps=COSINE_EPS)


def semantic_wise(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(`proto`, `dist`): mean squared and mean absolute difference of similarity maps (counted, V); scalars.

    `dist` only steers the preference, so it carries no gradient.
    """
    difference = student - teacher
    return difference.square().mean(), difference.detach().abs().mean()
