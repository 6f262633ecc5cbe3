"""One training step's objective: the fused, separate and distilled paths of every sample, and their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.backbone import Backbone, Features, Fused, Mask
from training.passion.distillation import SoftTargets, pixel_wise, semantic_wise, similarity
from training.passion.losses import Truth, deep_supervision, probabilities, supervised
from training.passion.preference import relative_preference

KL_WEIGHT = 0.5
PROTO_WEIGHT = 0.1


@dataclass(frozen=True)
class Terms:
    """The unweighted losses of a batch. `sep`, `kl`, `proto`, `dist` are 0 where a modality is missing."""

    fuse: Tensor
    """(B,)"""
    prm: Tensor
    """(B,)"""
    sep: Tensor
    """(B, K)"""
    kl: Tensor
    """(B, K)"""
    proto: Tensor
    """(B, K)"""
    dist: Tensor
    """(B, K), without gradient."""
    mask: Tensor
    """(B, K) bool"""

    def preference(self) -> Tensor:
        """Relative preference (K,); positive for the modalities that lag."""
        return relative_preference(self.dist, self.mask)

    def baseline(self) -> Tensor:
        """The backbone's own loss, without PASSION: fuse + prm + sum_k sep_k."""
        return self.fuse.sum() + self.prm.sum() + self.sep.sum()

    def passion(self, beta: Tensor, modal_weight: Tensor) -> Tensor:
        """The total with beta (K,) and w = N / N_k (K,); only modalities that lag in this batch get sep and proto."""
        lag = (self.preference() > 0).to(beta.dtype)
        weight = beta * modal_weight
        per_modality = (
            lag * weight * self.sep.sum(0)
            + KL_WEIGHT * weight * self.kl.sum(0)
            + PROTO_WEIGHT * lag * modal_weight * self.proto.sum(0)
        )
        return self.fuse.sum() + self.prm.sum() + per_modality.sum()

    def warm_up(self, beta: Tensor, modal_weight: Tensor) -> Tensor:
        """Only the separate paths: sum_k beta_k w_k sep_k."""
        return (beta * modal_weight * self.sep.sum(0)).sum()


@dataclass(frozen=True)
class _Sample:
    mask: tuple[bool, ...]
    truth: Truth
    features: Features
    teacher: Fused


def terms(
    network: Backbone, x: Tensor, labels: Tensor, masks: Sequence[Mask], classes: int, *, distil: bool = True
) -> Terms:
    """All losses of a batch x (B, K, D, H, W), class indices labels (B, D, H, W), one mask per sample.

    Without `distil` (the baseline) no student runs: kl, proto and dist are 0. Samples run one by one: masks differ, and
    InstanceNorm makes a sample's result independent of its batch.
    """
    samples = []
    for b, mask in enumerate(masks):
        features = network.encode(x[b : b + 1], mask)
        samples.append(_Sample(tuple(mask), Truth.of(labels[b], classes), features, network.fuse(features, mask)))
    zero = x.new_zeros(())
    columns = len(masks[0])
    fuse, prm, sep = [], [], []
    kl, proto, dist = ([[zero] * columns for _ in samples] for _ in range(3))
    counts = torch.stack([s.truth.counts for s in samples])
    # Prototypes exist for the classes that every sample of the batch has.
    counted = torch.nonzero((counts > 0).all(0)).flatten().tolist()
    for b, sample in enumerate(samples):
        fuse.append(supervised(probabilities(sample.teacher.logits), sample.truth))
        prm.append(deep_supervision(sample.teacher.logits, sample.teacher.deep, sample.truth))
        alone = network.separate(sample.features)
        sep.append(torch.stack([zero if p is None else supervised(probabilities(p), sample.truth) for p in alone]))
        if distil:
            kl[b], proto[b], dist[b] = _distil(network, sample, counted, zero)
    return Terms(
        fuse=torch.stack(fuse),
        prm=torch.stack(prm),
        sep=torch.stack(sep),
        kl=_matrix(kl),
        proto=_matrix(proto),
        dist=_matrix(dist),
        mask=torch.tensor([s.mask for s in samples], device=x.device),
    )


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row) for row in rows])


def _distil(
    network: Backbone, sample: _Sample, counted: list[int], zero: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    targets = SoftTargets.of(sample.teacher)
    with torch.no_grad():
        teacher_map = similarity(sample.teacher.feature, sample.truth, counted)
    kl, proto, dist = ([zero] * len(sample.mask) for _ in range(3))
    for k, there in enumerate(sample.mask):
        if not there:
            continue
        if sum(sample.mask) == 1:
            # Its own teacher: every value is 0, but the clamp leaves the pixel-wise term a gradient, as released.
            kl[k] = pixel_wise(sample.teacher, targets)
            continue
        student = network.fuse(sample.features, [i == k for i in range(len(sample.mask))])
        kl[k] = pixel_wise(student, targets)
        proto[k], dist[k] = semantic_wise(similarity(student.feature, sample.truth, counted), teacher_map)
    return kl, proto, dist
