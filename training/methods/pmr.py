"""`Pmr`: modalities that lag are pulled to the prototypes of their classes, those ahead are held back at first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.methods.discrepancy import class_mean, comparable, compared, ratio
from training.methods.epoch_means import EpochMeans
from training.passion.losses import Truth
from training.passion.objective import Sample, Terms

PULL_WEIGHT = 1.0
ENTROPY_WEIGHT = 0.1
ENTROPY_EPOCHS = 10
MOMENTUM = 0.9
DISTANCE_MIN = 1e-3
"""Nearer to a prototype than this a voxel is not pulled: rounding would say where to."""


class Pmr:
    """Prototypical modal rebalance.

    Fan, Xu, Wang, Wang, Guo: "PMR: Prototypical Modal Rebalance for Multimodal Learning", CVPR 2023 (arXiv 2211.07089).
    There, for modality u, samples i with feature z_i^u and class y_i, and the prototype c_j^u, the mean feature of
    class j:

        p_i^u(j) = exp(-d(z_i^u, c_j^u)) / sum_j' exp(-d(z_i^u, c_j'^u)),  d Euclidean: a classifier without weights
        PCE^u    = -log p_i^u(y_i), the prototypical cross-entropy
        H^u      = -sum_j p_i^u(j) log p_i^u(j)
        rho^u    = sum_i p_i^u(y_i) / sum_i p_i^v(y_i)
        total    = task loss + alpha sum_u clip(1 / rho^u - 1, 0, 1) PCE^u, which pulls the slow modality, and in the
                   first epochs - mu sum_u clip(rho^u - 1, 0, 1) H^u, which keeps the fast one from settling too early

    Here:

    - A sample is a voxel, its feature the finest level of the modality's encoder. PCE, H and the score p(y) are means
      over the voxels of a class, then over the crop's classes (`class_mean` says why), and summed over the batch as
      the other losses are.
    - Prototypes carry no gradient. The paper makes them anew from training data in every epoch; here they follow as
      moving averages, c <- 0.9 c + 0.1 mean over the step's samples, in each step before they are used, because another
      pass over the volumes would cost much of an epoch. A class that a modality has not met yet is none of its choices.
    - K modalities: rho_k is against the mean of the others that the sample's fused path has. A modality that the sample
      lacks has no say, moves no prototypes and has no loss; a sample with one modality, or a crop of one class, moves
      prototypes only.
    - alpha, mu, the number of first epochs and the momentum are of our choosing (1, 0.1, 10, 0.9), not tuned.
    """

    distils = False
    sums = 2
    waits = True

    def __init__(self, modalities: Sequence[str], classes: int) -> None:
        self.modalities = tuple(modalities)
        self.prototypes: list[list[Tensor | None]] = [[None] * classes for _ in self.modalities]
        """By modality and class, (F,) float32; None until a crop had it."""
        self.epoch = 0
        """Epochs done."""
        self._scores = EpochMeans(self.modalities)
        self._pulls = EpochMeans(self.modalities)
        self._rho = torch.ones(len(self.modalities), dtype=torch.float64)  # of the step under way

    def give(self, losses: Terms, number: int) -> Tensor:
        """First the mean features by modality and class, and how many samples had them: (K * C * (F + 1),). Then, with
        the prototypes in place, the scores that compare: (3K,)."""
        return self._features(losses.samples) if number == 0 else self._compared(losses.samples)

    def take(self, whole: Tensor, number: int) -> None:
        """First the prototypes follow, then it shows who is ahead."""
        if number == 0:
            self._follow(whole.view(len(self.modalities), len(self.prototypes[0]), -1))
            return
        whole = whole.view(3, -1)
        self._rho = ratio(whole)
        self._scores.add_sums(whole[[0, 2]])
        self._pulls.add(pulls(self._rho)[None], whole[2:] > 0)

    def total(self, losses: Terms, _weight: Tensor) -> Tensor:
        """fuse + prm + sum_k sep_k, the pull of the slow modalities, and at first the entropy of the fast ones."""
        pull, hold = pulls(self._rho), holds(self._rho)
        total = losses.baseline()
        for row in self._readings(losses.samples):
            for reading, pulled, held in zip(row, pull.tolist(), hold.tolist(), strict=True):
                if reading and pulled:
                    total = total + PULL_WEIGHT * pulled * reading.cross_entropy()
                if reading and held and self.epoch < ENTROPY_EPOCHS:
                    total = total - ENTROPY_WEIGHT * held * reading.entropy()
        return total

    def coefficients(self, _weight: Tensor) -> None:
        """See `Method.coefficients`: the total is more than a weighted sum."""

    def after_backward(self, _network: nn.Module) -> None:
        """Nothing to change: the losses do it."""

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """Mean score p(y) and mean pull clip(1 / rho - 1, 0, 1) of each modality where it had a say."""
        self.epoch = epoch + 1
        return {"score": self._scores.take(), "pull": self._pulls.take()}

    def figures(self) -> dict[str, Any]:
        """Nothing to tell."""
        return {}

    def state(self) -> dict[str, Any]:
        """Prototypes, the epoch and its figures so far."""
        return {
            "prototypes": [[None if c is None else c.tolist() for c in row] for row in self.prototypes],
            "epoch": self.epoch,
            "scores": self._scores.state(),
            "pulls": self._pulls.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """See `Method.restore`."""
        self.prototypes = [[None if c is None else torch.tensor(c) for c in row] for row in state["prototypes"]]
        self.epoch = state["epoch"]
        self._scores.restore(state["scores"])
        self._pulls.restore(state["pulls"])

    @torch.no_grad()
    def _features(self, samples: Sequence[Sample]) -> Tensor:
        known = [c for row in self.prototypes for c in row if c is not None]
        there = [f for sample in samples for f in sample.features[0] if f is not None]
        width = there[0].shape[1] if there else len(known[0])  # an empty batch is never the first of a run
        sums = torch.zeros(len(self.modalities), len(self.prototypes[0]), width + 1, dtype=torch.float64)
        for sample in samples:
            for k in range(len(self.modalities)):
                found = _voxels(sample, k)
                if found is None:
                    continue
                feature, truth = found
                for c in torch.nonzero(truth.counts).flatten().tolist():
                    sums[k, c, :-1] += (feature @ truth.onehot[c] / truth.counts[c]).cpu()
                    sums[k, c, -1] += 1
        return sums.flatten()

    def _follow(self, sums: Tensor) -> None:
        """Move the prototypes of the step's modalities and classes towards their mean features."""
        for k, c in torch.nonzero(sums[..., -1]).tolist():
            mean, old = (sums[k, c, :-1] / sums[k, c, -1]).float(), self.prototypes[k][c]
            self.prototypes[k][c] = mean if old is None else MOMENTUM * old + (1 - MOMENTUM) * mean

    @torch.no_grad()
    def _compared(self, samples: Sequence[Sample]) -> Tensor:
        if not samples:
            return torch.zeros(3 * len(self.modalities), dtype=torch.float64)
        score = torch.tensor([[r.score() if r else 0.0 for r in row] for row in self._readings(samples)])
        return compared(score, comparable(samples)).flatten()

    def _readings(self, samples: Sequence[Sample]) -> list[list[Reading | None]]:
        """By sample and modality, None without a say."""
        rows = comparable(samples).tolist() if samples else []
        return [
            [self._read(sample, k) if has_say else None for k, has_say in enumerate(row)]
            for sample, row in zip(samples, rows, strict=True)
        ]

    def _read(self, sample: Sample, k: int) -> Reading | None:
        found = _voxels(sample, k)
        return None if found is None else Reading.of(*found, self.prototypes[k])


@dataclass(frozen=True)
class Reading:
    """One modality of a sample, classified by the distances of its features to its prototypes."""

    log_p: Tensor
    """(P, V): log probability of each of the P classes that the modality has met."""
    log_true: Tensor
    """(V,): of the true class."""
    truth: Truth

    @classmethod
    def of(cls, feature: Tensor, truth: Truth, prototypes: Sequence[Tensor | None]) -> Reading:
        """From features (F, V) and prototypes (F,) by class; those of all classes in the sample must be there.

        There are P V distances: 8 MB for four classes in a crop of 80^3, and so no voxel is left out.
        """
        known = [c for c, prototype in enumerate(prototypes) if prototype is not None]
        centres = torch.stack([p.to(feature) for p in prototypes if p is not None])
        squares = feature.square().sum(0) - 2 * centres @ feature + centres.square().sum(1, keepdim=True)
        log_p = F.log_softmax(-squares.clamp(min=DISTANCE_MIN**2).sqrt(), dim=0)
        places = truth.labels.new_zeros(len(prototypes))
        places[known] = torch.arange(len(known), device=places.device)
        return cls(log_p, log_p.gather(0, places[truth.labels][None])[0], truth)

    def score(self) -> float:
        """Class-balanced mean probability of the true class."""
        return class_mean(self.log_true.detach().exp(), self.truth).item()

    def cross_entropy(self) -> Tensor:
        """PCE, class-balanced; a scalar."""
        return class_mean(-self.log_true, self.truth)

    def entropy(self) -> Tensor:
        """H in nats, class-balanced; a scalar."""
        return class_mean(-(self.log_p.exp() * self.log_p).sum(0), self.truth)


def pulls(rho: Tensor) -> Tensor:
    """clip(1 / rho - 1, 0, 1) (K,): how hard the modalities that lag are pulled."""
    return (1 / rho - 1).clamp(0, 1)


def holds(rho: Tensor) -> Tensor:
    """clip(rho - 1, 0, 1) (K,): how hard the modalities that are ahead are held back."""
    return (rho - 1).clamp(0, 1)


def _voxels(sample: Sample, k: int) -> tuple[Tensor, Truth] | None:
    """Modality k's finest features (F, V) and the truth on their grid, which some network may have coarser."""
    feature = sample.features[0][k]
    if feature is None or not sample.mask[k]:
        return None
    shape, full = feature.shape[2:], sample.teacher.logits.shape[2:]
    truth = sample.truth
    if shape != full:
        labels = F.interpolate(truth.labels.view(1, 1, *full).float(), size=tuple(shape), mode="nearest")
        truth = Truth.of(labels, len(truth.counts))
    return feature[0].flatten(1), truth
