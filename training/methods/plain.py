"""`Plain`: the backbone as published, without any rule between modalities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from training.passion.objective import Coefficients, Terms


class Plain:
    """fuse + prm + sum_k sep_k. The baseline of every comparison."""

    distils = False
    sums = 0
    waits = False

    def give(self, _losses: Terms, _number: int) -> Tensor:
        """There are no sums."""
        return torch.zeros(0, dtype=torch.float64)

    def take(self, _whole: Tensor, _number: int) -> None:
        """Nothing to take."""

    def total(self, losses: Terms, _weight: Tensor) -> Tensor:
        """See `Method.total`."""
        return losses.baseline()

    def coefficients(self, weight: Tensor) -> Coefficients:
        """See `Method.coefficients`."""
        return Coefficients.separate(torch.ones_like(weight))

    def after_backward(self, _network: nn.Module) -> None:
        """Nothing to change."""

    def end_epoch(self, _epoch: int) -> dict[str, Any]:
        """Nothing to tell."""
        return {}

    def figures(self) -> dict[str, Any]:
        """Nothing to tell."""
        return {}

    def state(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def restore(self, _state: dict[str, Any]) -> None:
        """Nothing to restore."""
