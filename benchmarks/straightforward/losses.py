"""The losses of the PASSION paper, map by map, with one-hot targets y (B, C, D, H, W); all give one value a sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import Output

CLAMP = 0.005
TEMPERATURE = 4.0
VOXELS = (2, 3, 4)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Class indices (B, D, H, W) -> (B, C, D, H, W) float."""
    return F.one_hot(labels, classes).permute(0, 4, 1, 2, 3).contiguous().float()


def weighted_cross_entropy(p: Tensor, y: Tensor) -> Tensor:
    """mean_v sum_c -(1 - |y_c| / sum_c |y_c|) y_c log(clamp(p_c)) of p (B, C, D, H, W) -> (B,)."""
    counts = y.sum(VOXELS, keepdim=True)
    weight = 1 - counts / counts.sum(1, keepdim=True)
    return (-weight * y * p.clamp(CLAMP, 1).log()).sum(1).mean((1, 2, 3))


def dice(p: Tensor, y: Tensor) -> Tensor:
    """1 - mean_c 2 <p_c, y_c> / (|p_c| + |y_c| + 1e-7) of p (B, C, D, H, W) -> (B,)."""
    overlap = (p * y).sum(VOXELS)
    return 1 - (2 * overlap / (p.sum(VOXELS) + y.sum(VOXELS) + 1e-7)).mean(1)


def supervised(p: Tensor, y: Tensor) -> Tensor:
    """wce + dice of class probabilities p (B, C, D, H, W) -> (B,)."""
    return weighted_cross_entropy(p, y) + dice(p, y)


def full_size(p: Tensor, size: Sequence[int]) -> Tensor:
    """Probabilities (B, C, d, h, w), upsampled in one step -> (B, C, *size)."""
    if p.shape[2:] == torch.Size(size):
        return p
    return F.interpolate(p, size=tuple(size), mode="trilinear", align_corners=True)


def deep_supervision(output: Output, y: Tensor) -> Tensor:
    """`prm`: sum_l 2^-(l+1) (wce + dice)(up(softmax(logits_l))) -> (B,)."""
    total = torch.zeros(len(y), device=y.device)
    for level, logits in enumerate(output.deep):
        total = total + 2.0 ** -(level + 1) * supervised(full_size(logits.softmax(1), y.shape[2:]), y)
    return total


def divergence(student: Tensor, teacher: Tensor, size: Sequence[int]) -> Tensor:
    """T^2 mean_{v,c} q_t (log q_t - log q_s) of logits (B, C, d, h, w), q = clamp(up(softmax(logits / T))) -> (B,)."""
    q_s = full_size((student / TEMPERATURE).softmax(1), size).clamp(CLAMP, 1)
    q_t = full_size((teacher / TEMPERATURE).softmax(1), size).clamp(CLAMP, 1)
    return TEMPERATURE**2 * (q_t * (q_t.log() - q_s.log())).mean((1, 2, 3, 4))


def pixel_wise(student: Output, teacher: Output) -> Tensor:
    """`kl`: the divergence of the output plus, level-weighted, of every deep map -> (B,)."""
    size = student.logits.shape[2:]
    total = divergence(student.logits, teacher.logits.detach(), size)
    for level, (of_student, of_teacher) in enumerate(zip(student.deep, teacher.deep, strict=True)):
        total = total + 2.0 ** -(level + 1) * divergence(of_student, of_teacher.detach(), size)
    return total


def similarity(feature: Tensor, y: Tensor) -> Tensor:
    """Cosine of every voxel's feature (B, F, D, H, W) with its sample's class prototypes -> (B, C, D, H, W).

    A prototype is the mean feature over a class. It is not detached.
    """
    of_class = feature[:, None] * y[:, :, None]  # (B, C, F, D, H, W)
    prototypes = of_class.sum((3, 4, 5), keepdim=True) / (y.sum(VOXELS)[:, :, None, None, None, None] + 1e-5)
    return F.cosine_similarity(feature[:, None], prototypes, dim=2, eps=1e-5)


def semantic_wise(student: Tensor, teacher: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(`proto`, `dist`) of features (B, F, D, H, W): mean squared and mean absolute difference of their similarities.

    Means over the classes that every sample of the batch has and over voxels -> (B,) each. `dist` only steers the
    preference, so it carries no gradient.
    """
    counted = (y.sum(VOXELS) > 0).all(0)
    difference = (similarity(student, y) - similarity(teacher.detach(), y))[:, counted]
    return difference.square().mean((1, 2, 3, 4)), difference.detach().abs().mean((1, 2, 3, 4))


def relative_preference(dist: Tensor, masks: Tensor) -> Tensor:
    """rp_k = sum_b m_bk (dist_bk / mean_present(dist_b) - 1) of dist (B, K), masks (B, K) bool -> (K,).

    A sample with one modality is its own teacher and adds 0, as does any whose students all equal the teacher.
    """
    several = masks & (masks.sum(1, keepdim=True) > 1)
    mean = (dist * masks).sum(1, keepdim=True) / masks.sum(1, keepdim=True)  # (B, 1)
    counts = several & (mean > 0)
    relative = dist / torch.where(mean > 0, mean, torch.ones_like(mean)) - 1
    return torch.where(counts, relative, torch.zeros_like(relative)).sum(0)
