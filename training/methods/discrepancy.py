"""How far each modality is ahead of the others of the same sample: the ratio that OGM-GE and PMR share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.passion.losses import Truth
from training.passion.objective import Sample


def class_mean(values: Tensor, truth: Truth) -> Tensor:
    """Mean of values (V,) within each class that the sample has, then over these classes; a scalar.

    About 98 % of the voxels are background, where every modality is nearly right: a mean over voxels would be the same
    for all. A mean over the foreground would prefer a modality that calls everything tumour, and count oedema many
    times the thin enhancing rim. So every class has the same say, background too.
    """
    there = truth.counts > 0
    return ((truth.onehot @ values)[there] / truth.counts[there]).mean()


def comparable(samples: Sequence[Sample]) -> Tensor:
    """(B, K) bool: the modalities of each fused path, where they are two or more and the crop has two classes or more.

    A modality alone has nobody to be ahead of, and a crop of background alone shows no modality's strength.
    """
    rows = [
        sample.mask
        if sum(sample.mask) > 1 and int((sample.truth.counts > 0).sum()) > 1
        else (False,) * len(sample.mask)
        for sample in samples
    ]
    return torch.tensor(rows)


def discrepancy(score: Tensor, say: Tensor) -> Tensor:
    """rho_k = sum_b s_bk / sum_b mean_{j != k} s_bj for scores (B, K), over the samples and modalities in `say` (B, K).

    (K,) float64 on the CPU; 1, which is balance, for a modality without a say. Every row of `say` has none or at least
    two modalities. With two modalities that every sample has it is the papers' ratio of sums over the batch.
    """
    return ratio(compared(score, say))


def compared(score: Tensor, say: Tensor) -> Tensor:
    """(3, K) float64 on the CPU: `discrepancy`'s two sums, and in how many samples each modality has a say."""
    # In double precision the mean of equal float32 scores is exactly that score, and so balance is exactly 1.
    score = torch.where(say, score.detach().to("cpu", torch.float64), torch.zeros((), dtype=torch.float64))
    others = (score.sum(1, keepdim=True) - score) / (say.sum(1, keepdim=True) - 1).clamp(min=1)
    theirs = torch.where(say, others, torch.zeros_like(others))
    return torch.stack([score.sum(0), theirs.sum(0), say.sum(0).double()])


def ratio(whole: Tensor) -> Tensor:
    """rho (K,) from `compared` (3, K), summed over all samples of a step."""
    own, theirs, _ = whole
    return torch.where(theirs > 0, own / theirs, torch.ones_like(own))
