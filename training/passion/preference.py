"""Relative preference: which modalities lag in a step, and how hard to push each over the epochs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

ETA = 0.01
ETA_GROWTH = 1.5
ETA_PERIOD = 100
BETA_MIN, BETA_MAX = 0.1, 4.0


def relative_preference(dist: Tensor, mask: Tensor) -> Tensor:
    """rp_k = sum_b m_bk (dist_bk / mean_present(dist_b) - 1) for dist (B, K), mask (B, K) bool -> (K,).

    A sample with one modality is its own teacher and says nothing. Positive means: this modality lags.
    """
    mask = mask & (mask.sum(1, keepdim=True) > 1)
    mean = (dist * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    relative = dist / mean.clamp(min=torch.finfo(dist.dtype).tiny) - 1
    # A sample whose students all equal the teacher has no preference either.
    return torch.where(mask & (mean > 0), relative, torch.zeros_like(dist)).sum(0)


def distances(dist: Tensor, mask: Tensor) -> Tensor:
    """(2, K) float64 on the CPU: the sum of the distances (B, K) where the modality was present (B, K), how often."""
    dist, mask = dist.detach().to("cpu", torch.float64), mask.cpu()
    return torch.stack([torch.where(mask, dist, torch.zeros_like(dist)).sum(0), mask.sum(0).double()])


@dataclass
class Preference:
    """beta, the gradient-wise regularisation: one weight a modality, starting at 1, its l2 norm kept at sqrt(K).

    The paper has K = 4, and so norm 2.
    """

    beta: Tensor
    eta: float = ETA
    _sum: Tensor = field(init=False)
    _steps: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.beta = self.beta.double()
        self.reset()

    @classmethod
    def start(cls, modalities: int) -> Preference:
        """All modalities alike."""
        return cls(torch.ones(modalities, dtype=torch.float64))

    def reset(self) -> None:
        """Forget the distances of the epoch."""
        self._sum = torch.zeros_like(self.beta)
        self._steps = torch.zeros_like(self.beta)

    def record(self, dist: Tensor, mask: Tensor) -> None:
        """Add a step's distances (B, K) where the modality was present (B, K)."""
        self.add(distances(dist, mask))

    def add(self, step: Tensor) -> None:
        """Add `distances` (2, K) of all samples of a step."""
        self._sum += step[0]
        self._steps += step[1]

    def update(self, epoch: int) -> Tensor:
        """End of epoch (from 0): beta <- clamp(beta - eta rp, 0.1, 4), rescaled. Returns the mean distances (K,)."""
        mean = self._sum / self._steps.clamp(min=1)
        self.apply(epoch, mean, self._steps > 0)
        self.reset()
        return mean

    def apply(self, epoch: int, dist: Tensor, seen: Tensor) -> None:
        """The update rule for mean distances (K,) of the modalities `seen` (K,) bool; the others keep their beta."""
        if epoch % ETA_PERIOD == 0:
            self.eta *= ETA_GROWTH
        overall = dist[seen].mean() if seen.any() else torch.zeros(())
        if overall <= 0:
            return
        rp = (overall - dist.double()) / overall
        beta = torch.where(seen, (self.beta - self.eta * rp).clamp(BETA_MIN, BETA_MAX), self.beta)
        left = len(beta) - beta[~seen].square().sum()  # of the squared norm K, for those seen
        self.beta = torch.where(seen, beta * (left / beta[seen].square().sum()).sqrt(), beta)

    def state(self) -> dict[str, object]:
        """Everything, as JSON can hold it."""
        return {
            "beta": self.beta.tolist(),
            "eta": self.eta,
            "sum": self._sum.tolist(),
            "steps": self._steps.tolist(),
        }

    @classmethod
    def restore(cls, state: dict[str, object]) -> Preference:
        """The inverse of `state`."""
        restored = cls(torch.tensor(state["beta"], dtype=torch.float64), eta=float(str(state["eta"])))
        restored._sum = torch.tensor(state["sum"], dtype=torch.float64)
        restored._steps = torch.tensor(state["steps"], dtype=torch.float64)
        return restored
