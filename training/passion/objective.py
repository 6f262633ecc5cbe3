"""One training step's objective: the fused, separate and distilled paths of every sample, and their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from models.backbone import Backbone, Features, Fused, Mask
from training.passion.distillation import SoftTargets, pixel_wise, semantic_wise
from training.passion.losses import Truth, deep_supervision, probabilities, supervised, total
from training.passion.preference import relative_preference
from training.passion.similarity import similarity

KL_WEIGHT = 0.5
PROTO_WEIGHT = 0.1


@dataclass(frozen=True)
class Switches:
    """Which parts of PASSION count: the rows of the paper's ablation."""

    pixel: bool = True
    """The pixel-wise distillation `kl`."""
    semantic: bool = True
    """The semantic-wise distillation `proto`."""
    task_wise: bool = True
    """`sep` and `proto` for lagging modalities only; otherwise for all present."""
    gradient_wise: bool = True
    """beta; otherwise 1."""


EVERYTHING = Switches()


@dataclass(frozen=True)
class Coefficients:
    """The weights (K,) of a batch's losses of each modality, in a total where fuse and prm have 1."""

    sep: Tensor
    kl: Tensor
    proto: Tensor

    @classmethod
    def passion(
        cls, preference: Tensor, beta: Tensor, modal_weight: Tensor, switches: Switches = EVERYTHING
    ) -> Coefficients:
        """From the batch's relative preference (K,), beta (K,) and w = N / N_k (K,): modalities that lag have sep and
        proto."""
        lag = (preference > 0).to(beta) if switches.task_wise else torch.ones_like(beta)
        weight = beta * modal_weight if switches.gradient_wise else modal_weight
        return cls(
            sep=lag * weight,
            kl=KL_WEIGHT * weight * switches.pixel,
            proto=PROTO_WEIGHT * lag * modal_weight * switches.semantic,
        )

    @classmethod
    def separate(cls, weight: Tensor) -> Coefficients:
        """The backbone's own total, with weights (K,) of the separate losses; no distillation."""
        return cls(sep=weight, kl=torch.zeros_like(weight), proto=torch.zeros_like(weight))


@dataclass(frozen=True)
class Sample:
    """One sample of a batch and what the network made of it."""

    mask: tuple[bool, ...]
    """What the fused path was given."""
    truth: Truth
    features: Features
    """Of every encoded modality, which may be more than `mask` has."""
    teacher: Fused
    alone: list[Tensor | None]
    """Class probabilities (C, V) of the separate decoder by modality, None where not encoded."""


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
    """(B, K) bool: the modalities of the fused path."""
    present: Tensor
    """(B, K) bool: the modalities with a `sep`; under `pdt` all, whatever the fused path is given."""
    samples: list[Sample]

    @classmethod
    def empty(cls, modalities: int, device: torch.device) -> Terms:
        """Of no sample at all."""
        scalar, row = torch.zeros(0, device=device), torch.zeros(0, modalities, device=device)
        return cls(scalar, scalar, row, row, row, row, row.bool(), row.bool(), [])

    @classmethod
    def joined(cls, parts: Sequence[Terms]) -> Terms:
        """The batches of one step as one batch."""
        tensors = {f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls) if f.name != "samples"}
        return cls(**tensors, samples=[s for p in parts for s in p.samples])

    def figures(self) -> Terms:
        """The numbers alone, without gradient and samples, which hold much of the step's memory."""
        tensors = {f.name: getattr(self, f.name).detach() for f in fields(self) if f.name != "samples"}
        return replace(self, **tensors, samples=[])

    def preference(self) -> Tensor:
        """Relative preference (K,); positive for the modalities that lag."""
        return relative_preference(self.dist, self.mask)

    def baseline(self) -> Tensor:
        """The backbone's own loss, without PASSION: fuse + prm + sum_k sep_k."""
        return self.fuse.sum() + self.prm.sum() + self.sep.sum()

    def weighted(self, weights: Coefficients) -> Tensor:
        """The total: fuse + prm + sum_k (weighted sep_k, kl_k and proto_k), summed over the batch; a scalar."""
        per_modality = weights.sep * self.sep.sum(0) + weights.kl * self.kl.sum(0) + weights.proto * self.proto.sum(0)
        return self.fuse.sum() + self.prm.sum() + per_modality.sum()

    def passion(self, beta: Tensor, modal_weight: Tensor, switches: Switches = EVERYTHING) -> Tensor:
        """The total with beta (K,) and w = N / N_k (K,); see `Coefficients.passion`."""
        return self.weighted(Coefficients.passion(self.preference(), beta, modal_weight, switches))

    def warm_up(self, modal_weight: Tensor) -> Tensor:
        """Only the separate paths: sum_k beta_k w_k sep_k, where beta is still 1."""
        return (modal_weight * self.sep.sum(0)).sum()


def terms(
    network: Backbone,
    x: Tensor,
    labels: Tensor,
    masks: Sequence[Mask],
    classes: int,
    *,
    present: Sequence[Mask] | None = None,
    distil: bool = True,
    counted: Sequence[int] | None = None,
) -> Terms:
    """All losses of a batch x (B, K, D, H, W), class indices labels (B, D, H, W), one mask per sample.

    `present` is what the separate decoder learns from, by sample: `masks` if not given, and never less. Without
    `distil` (the baseline) no student runs: kl, proto and dist are 0. `counted` are the classes with prototypes, those
    that every sample of x has if not given: other ranks, or other batches of the step, may lack one. Samples run one by
    one: masks differ, and InstanceNorm makes a sample's result independent of its batch.
    """
    present = masks if present is None else present
    samples = [
        _run(network, x[b : b + 1], Truth.of(labels[b], classes, x.dtype), tuple(mask), present[b])
        for b, mask in enumerate(masks)
    ]
    zero = x.new_zeros(())
    columns = len(masks[0])
    fuse, prm, sep = [], [], []
    kl, proto, dist = ([[zero] * columns for _ in samples] for _ in range(3))
    counted = in_all([s.truth for s in samples]) if counted is None else counted
    for b, sample in enumerate(samples):
        fuse.append(supervised(probabilities(sample.teacher.logits), sample.truth))
        prm.append(total(deep_supervision(sample.teacher.logits, sample.teacher.deep, sample.truth)))
        sep.append(torch.stack([zero if p is None else supervised(p, sample.truth) for p in sample.alone]))
        if distil:
            kl[b], proto[b], dist[b] = _distil(network, sample, counted, zero)
    return Terms(
        fuse=torch.stack(fuse),
        prm=torch.stack(prm),
        sep=torch.stack(sep),
        kl=matrix(kl),
        proto=matrix(proto),
        dist=matrix(dist),
        mask=torch.tensor([s.mask for s in samples], device=x.device),
        present=torch.tensor([list(p) for p in present], device=x.device),
        samples=samples,
    )


def _run(network: Backbone, x: Tensor, truth: Truth, mask: tuple[bool, ...], present: Mask) -> Sample:
    features = network.encode(x, present)
    teacher = network.fuse(features, mask)
    alone = [None if logits is None else probabilities(logits) for logits in network.separate(features)]
    return Sample(mask, truth, features, teacher, alone)


def in_all(truths: Sequence[Truth]) -> list[int]:
    """The classes that every sample of the batch has: only these have prototypes."""
    counts = torch.stack([truth.counts for truth in truths])
    classes: list[int] = torch.nonzero((counts > 0).all(0)).flatten().tolist()
    return classes


def matrix(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Scalars by sample and modality -> (B, K)."""
    return torch.stack([torch.stack(list(row)) for row in rows])


def _distil(
    network: Backbone, sample: Sample, counted: Sequence[int], zero: Tensor
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
            kl[k] = total(pixel_wise(sample.teacher, targets))
            continue
        student = network.fuse(sample.features, [i == k for i in range(len(sample.mask))])
        kl[k] = total(pixel_wise(student, targets))
        proto[k], dist[k] = semantic_wise(similarity(student.feature, sample.truth, counted), teacher_map, counted)
    return kl, proto, dist
