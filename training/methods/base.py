"""`Method`: what a training method decides. The trainer knows no more of it than this."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from training.passion.objective import Coefficients, Terms


class Method(Protocol):
    """How a step's losses become one number, and what is done between backward and the optimiser's step.

    A step may be spread over ranks, and over batches that accumulate gradients; its result must not depend on that. So
    what a method needs of all samples goes through sums over them: every batch gives its part, and takes the whole.
    """

    @property
    def distils(self) -> bool:
        """Whether `total` needs the students: `Terms.kl`, `proto` and `dist`."""

    @property
    def sums(self) -> int:
        """How many sums over the samples of a step the method takes, one after the other; 0 if it needs none."""

    @property
    def waits(self) -> bool:
        """Whether `total` needs them, or only `after_backward` and `end_epoch`; they then depend on no other sum."""

    def give(self, losses: Terms, number: int) -> Tensor:
        """A batch's part of a sum, a vector in float64 on the CPU. The batch may be empty. Changes nothing."""

    def take(self, whole: Tensor, number: int) -> None:
        """The sum over all samples of the step, once a step. Notes what the end of the epoch needs."""

    def total(self, losses: Terms, weight: Tensor) -> Tensor:
        """The loss of a batch, a scalar, and a sum over its samples; `weight` (K,) is N / N_k. Changes nothing."""

    def coefficients(self, weight: Tensor) -> Coefficients | None:
        """The weights in `total`, if it is a weighted sum of the losses and the sums need distances at most.

        A step can then undo its paths one by one (`training.passion.staged`). None if its graph is needed as a whole.
        """

    def after_backward(self, network: nn.Module) -> None:
        """May change gradients. Encoders are the submodules `<modality>_encoder` of every backbone."""

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """Update after an epoch (from 0); returns the epoch's figures for the log, groups by modality or scalars."""

    def figures(self) -> dict[str, Any]:
        """Where the method stands, for the log and the card; groups by modality or scalars."""

    def state(self) -> dict[str, Any]:
        """All that resuming needs, as JSON can hold it."""

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""


def settle(method: Method, losses: Terms, pool: Callable[[Tensor], Tensor] = lambda part: part) -> None:
    """Let a method take its sums of a step that is one batch on every rank; `pool` adds up the ranks' parts."""
    with torch.no_grad():
        for number in range(method.sums):
            method.take(pool(method.give(losses, number)), number)
