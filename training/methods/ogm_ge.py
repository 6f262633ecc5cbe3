"""`OgmGe`: the encoders of modalities that are ahead learn slower, with noise in exchange."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.methods.discrepancy import class_mean, comparable, compared, ratio
from training.methods.epoch_means import EpochMeans
from training.passion.objective import Sample, Terms

ALPHA = 0.1
"""Strength of the modulation. The paper tunes it for every data set; this value is not tuned for any of ours."""


class OgmGe:
    """On-the-fly gradient modulation with generalisation enhancement.

    Peng, Wei, Deng, Wang, Hu: "Balanced Multimodal Learning via On-the-fly Gradient Modulation", CVPR 2022
    (arXiv 2203.15332). There, for two modalities u, v and a batch of samples i with class y_i:

        s_i^u   = softmax(the logits that u alone gives)[y_i]
        rho^u   = sum_i s_i^u / sum_i s_i^v
        k^u     = 1 - tanh(alpha rho^u)  if rho^u > 1, else 1
        theta^u <- theta^u - eta (k^u g^u + h^u),  h^u ~ N(0, covariance of g^u)

    g is the gradient of encoder u. The noise h is the generalisation enhancement: k damps the gradient's own noise,
    which helps to generalise, and h gives it back.

    Here:

    - What a modality alone gives is the separate decoder's output; a sample is a crop, and its score the mean
      probability of the true class, every class counting alike (`class_mean` says why).
    - K modalities: rho_k is against the mean of the others that the sample's fused path has. A modality that the sample
      lacks has no say and is not touched; a sample with one modality, or a crop of one class, changes nothing.
    - h has the standard deviation of each weight tensor's gradient, as drawing from a full covariance is out of reach,
      and goes to the damped encoders only: where k = 1 no noise was lost, and a balanced step stays as it is.
    - The optimiser is AdamW, which divides by the gradient's recent size: a damping that never changed would have no
      effect, and one that comes and goes has less than under the paper's SGD.
    """

    distils = False
    sums = 1
    waits = False

    def __init__(self, modalities: Sequence[str]) -> None:
        self.modalities = tuple(modalities)
        self._coefficients = torch.ones(len(self.modalities), dtype=torch.float64)  # of the step under way
        self._means = EpochMeans(self.modalities)

    def give(self, losses: Terms, _number: int) -> Tensor:
        """The scores that compare: (3K,)."""
        if not losses.samples:
            return torch.zeros(3 * len(self.modalities), dtype=torch.float64)
        return compared(scores(losses.samples), comparable(losses.samples)).flatten()

    def take(self, whole: Tensor, _number: int) -> None:
        """By how much each encoder's gradient will be damped."""
        whole = whole.view(3, -1)
        self._coefficients = coefficients(ratio(whole))
        self._means.add(self._coefficients[None], whole[2:] > 0)

    def total(self, losses: Terms, _weight: Tensor) -> Tensor:
        """The backbone's own loss."""
        return losses.baseline()

    def coefficients(self, _weight: Tensor) -> None:
        """See `Method.coefficients`: the sums need what the network made of the samples."""

    def after_backward(self, network: nn.Module) -> None:
        """Damp the gradients of the encoders that are ahead, and add the noise."""
        for name, coefficient in zip(self.modalities, self._coefficients.tolist(), strict=True):
            if coefficient < 1:
                modulate(network.get_submodule(f"{name}_encoder"), coefficient)

    def end_epoch(self, _epoch: int) -> dict[str, Any]:
        """Mean coefficient k of each modality over the steps where it had a say."""
        return {"coefficient": self._means.take()}

    def figures(self) -> dict[str, Any]:
        """Nothing lasts from step to step."""
        return {}

    def state(self) -> dict[str, Any]:
        """The epoch's figures so far."""
        return self._means.state()

    def restore(self, state: dict[str, Any]) -> None:
        """See `Method.restore`."""
        self._means.restore(state)


@torch.no_grad()
def scores(samples: Sequence[Sample]) -> Tensor:
    """s (B, K): class-balanced mean probability that the separate decoder gives the true class; 0 where missing."""
    return torch.stack([torch.stack([_score(sample, k) for k in range(len(sample.mask))]) for sample in samples])


def _score(sample: Sample, k: int) -> Tensor:
    p = sample.alone[k]
    if p is None:
        return sample.truth.counts.new_zeros(())
    return class_mean(p.gather(0, sample.truth.labels[None])[0], sample.truth)


def coefficients(rho: Tensor, alpha: float = ALPHA) -> Tensor:
    """k (K,) from rho (K,): 1 - tanh(alpha rho) where rho > 1, else 1."""
    return torch.where(rho > 1, 1 - torch.tanh(alpha * rho), torch.ones_like(rho))


def modulate(encoder: nn.Module, coefficient: float) -> None:
    """g <- k g + h for every weight tensor, h ~ N(0, var(g)) from torch's global generator."""
    for parameter in encoder.parameters():
        gradient = parameter.grad
        if gradient is not None:
            noise = torch.randn_like(gradient) * gradient.std(correction=0)
            gradient.mul_(coefficient).add_(noise)
