"""`Dwa`: the separate losses of modalities that descend slowly get more weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.methods.epoch_means import EpochMeans, sums
from training.passion.objective import Coefficients, Terms

TEMPERATURE = 2.0


class Dwa:
    """Dynamic weight averaging, on the losses of the modalities.

    Liu, Johns, Davison: "End-to-End Multi-Task Learning with Attention", CVPR 2019 (arXiv 1803.10704). There, for K
    tasks with mean loss L_k(t) of epoch t:

        w_k(t - 1) = L_k(t - 1) / L_k(t - 2),  and 1 for the first two epochs
        lambda_k(t) = K exp(w_k(t - 1) / T) / sum_i exp(w_i(t - 1) / T),  T = 2

    Here the tasks are the modalities, and L_k the separate decoder's loss: total = fuse + prm + sum_k lambda_k sep_k.
    The fused path stays as it is. L_k is the mean over those samples of the epoch that have k, so a modality is not
    taken for slow because it is rare. A modality that an epoch lacks keeps its two losses; one with fewer than two
    keeps lambda_k = 1, and the others share what is left, so that the lambdas always sum to K.
    """

    distils = False
    sums = 1
    waits = False

    def __init__(self, modalities: Sequence[str]) -> None:
        self.modalities = tuple(modalities)
        self.losses: dict[str, list[float]] = {name: [] for name in self.modalities}
        """Mean separate losses of the last two epochs that had the modality, older first."""
        self._means = EpochMeans(self.modalities)

    @property
    def weights(self) -> Tensor:
        """lambda (K,), float64."""
        return averaged([self.losses[name] for name in self.modalities])

    def give(self, losses: Terms, _number: int) -> Tensor:
        """Separate losses, and how often each modality had one: (2K,)."""
        return sums(losses.sep, losses.present).flatten()

    def take(self, whole: Tensor, _number: int) -> None:
        """For the epoch's means."""
        self._means.add_sums(whole.view(2, -1))

    def total(self, losses: Terms, weight: Tensor) -> Tensor:
        """fuse + prm + sum_k lambda_k sep_k."""
        return losses.weighted(self.coefficients(weight))

    def coefficients(self, weight: Tensor) -> Coefficients:
        """See `Method.coefficients`."""
        return Coefficients.separate(self.weights.to(weight))

    def after_backward(self, _network: nn.Module) -> None:
        """Nothing to change: lambda already weighs the losses."""

    def end_epoch(self, _epoch: int) -> dict[str, Any]:
        """lambda follows the epoch's losses, which the log has as `sep` already."""
        for name, mean in self._means.take().items():
            self.losses[name] = [*self.losses[name][-1:], mean]
        return {}

    def figures(self) -> dict[str, Any]:
        """lambda by modality."""
        return {"lambda": dict(zip(self.modalities, self.weights.tolist(), strict=True))}

    def state(self) -> dict[str, Any]:
        """The two last epochs' losses, and this epoch's so far."""
        return {"losses": self.losses, "means": self._means.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Method.restore`."""
        self.losses = {name: list(state["losses"][name]) for name in self.modalities}
        self._means.restore(state["means"])


def averaged(losses: Sequence[Sequence[float]], temperature: float = TEMPERATURE) -> Tensor:
    """lambda (K,) float64 from each modality's losses, older first: two, or fewer for those that stay at 1."""
    weights = torch.ones(len(losses), dtype=torch.float64)
    ready = [k for k, own in enumerate(losses) if len(own) == 2]
    if ready:
        before, last = torch.tensor([list(losses[k]) for k in ready], dtype=torch.float64).unbind(1)
        rate = last / before.clamp(min=torch.finfo(torch.float64).tiny)
        weights[ready] = len(ready) * (rate / temperature).softmax(0)
    return weights
