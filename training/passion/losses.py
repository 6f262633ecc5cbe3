"""Supervised losses of one sample: weighted cross-entropy and Dice on class probabilities.

Source: the PASSION paper (arXiv 2407.14796) and its released training. All functions take one sample, without a batch
axis in the targets, because every sample has a mask of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models import layout
from models.blocks import upsample

CLAMP = 0.005
DICE_EPS = 1e-7


@dataclass(frozen=True)
class Truth:
    """The labels of one sample in the forms that the losses use."""

    labels: Tensor
    """(V,) class indices, int64."""
    onehot: Tensor
    """(C, V)"""
    counts: Tensor
    """(C,) voxels of each class."""

    @classmethod
    def of(cls, labels: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Truth:
        """From class indices (D, H, W), for probabilities of a precision."""
        flat = labels.reshape(-1).long()
        onehot = torch.zeros(classes, flat.numel(), dtype=dtype, device=flat.device).scatter_(0, flat[None], 1.0)
        return cls(flat, onehot, onehot.sum(1))


def supervised(p: Tensor, truth: Truth) -> Tensor:
    """wce + dice of class probabilities p (C, V); a scalar.

    wce = mean_v sum_c -(1 - |y_c| / sum|y|) y_c log(clamp(p_c, 0.005, 1)): only the true class's probability counts,
    so it is gathered once. dice = 1 - mean_c 2<p_c, y_c> / (|p_c| + |y_c| + 1e-7).
    """
    true_p = p.gather(0, truth.labels[None])[0]
    weight = (1 - truth.counts / truth.counts.sum())[truth.labels]
    wce = -(weight * true_p.clamp(CLAMP, 1).log()).mean()
    if true_p.is_cuda:  # where half a million voxels would queue to be added to a handful of sums
        overlap = layout.long_product(truth.onehot, true_p[None])[:, 0]
    else:
        overlap = torch.zeros_like(truth.counts).index_add(0, truth.labels, true_p)
    dice = 1 - (2 * overlap / (p.sum(1) + truth.counts + DICE_EPS)).mean()
    return wce + dice


def probabilities(logits: Tensor, factor: int = 1, temperature: float = 1.0) -> Tensor:
    """softmax(logits / T), then upsampled: (1, C, d, h, w) -> (C, V) at full resolution."""
    if temperature != 1:
        logits = logits / temperature
    return voxels(upsample(logits.softmax(1), factor))


def voxels(x: Tensor) -> Tensor:
    """(1, c, D, H, W) -> (c, V): a view."""
    return layout.voxels(x)[0]


def level_weight(level: int) -> float:
    """2^-(l+1), l = 0 for the finest map."""
    return 2.0 ** -(level + 1)


def factors(logits: Tensor, deep: Sequence[Tensor]) -> list[int]:
    """How many times smaller than the output each deep supervision map is."""
    return [logits.shape[-1] // d.shape[-1] for d in deep]


def deep_supervision(logits: Tensor, deep: Sequence[Tensor], truth: Truth) -> Iterator[Tensor]:
    """`prm`, in parts to be added up: the supervised loss of every deep supervision map, weighted by level; scalars."""
    for level, (d, factor) in enumerate(zip(deep, factors(logits, deep), strict=True)):
        yield level_weight(level) * supervised(probabilities(d, factor), truth)


def total(parts: Iterable[Tensor]) -> Tensor:
    """Scalars added up."""
    return torch.stack(list(parts)).sum()
