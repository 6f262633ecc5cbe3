"""`EpochMeans`: the mean of a figure by modality, over the samples or steps of an epoch in which it was defined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sums(values: Tensor, there: Tensor) -> Tensor:
    """(2, K) float64 on the CPU: the sum of values (B, K) where `there` (B, K) bool, and how many these are."""
    values, there = values.detach().to("cpu", torch.float64), there.cpu()
    return torch.stack([torch.where(there, values, torch.zeros_like(values)).sum(0), there.sum(0).double()])


class EpochMeans:
    """Sums and counts by modality, in double precision, so that they survive JSON unchanged."""

    def __init__(self, modalities: Sequence[str]) -> None:
        self.modalities = tuple(modalities)
        self._reset()

    def add(self, values: Tensor, there: Tensor) -> None:
        """Add values (B, K) where `there` (B, K) bool."""
        self.add_sums(sums(values, there))

    def add_sums(self, step: Tensor) -> None:
        """Add `sums` (2, K) of all samples of a step."""
        self._sums += step[0]
        self._counts += step[1].long()

    def take(self) -> dict[str, float]:
        """The mean of every modality that had a value, and start anew."""
        sums, counts = self._sums.tolist(), self._counts.tolist()
        self._reset()
        return {name: s / n for name, s, n in zip(self.modalities, sums, counts, strict=True) if n}

    def state(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {"sums": self._sums.tolist(), "counts": self._counts.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._sums = torch.tensor(state["sums"], dtype=torch.float64)
        self._counts = torch.tensor(state["counts"], dtype=torch.int64)

    def _reset(self) -> None:
        self._sums = torch.zeros(len(self.modalities), dtype=torch.float64)
        self._counts = torch.zeros(len(self.modalities), dtype=torch.int64)
