"""`Method`: what a training method decides. The trainer knows no more of it than this."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from training.passion.objective import Terms
from training.passion.staged import Weigh


class Method(Protocol):
    """How a step's losses become one number, and what is done between backward and the optimiser's step."""

    @property
    def distils(self) -> bool:
        """Whether `total` needs the students: `Terms.kl`, `proto` and `dist`."""

    def total(self, losses: Terms, weight: Tensor) -> Tensor:
        """The loss of a batch, a scalar; `weight` (K,) is N / N_k. Notes what the end of the epoch needs."""

    def weigher(self, weight: Tensor) -> Weigh | None:
        """If the total is a sum of the losses: how to tell their weights from a batch's distances, which lets a step
        run its backward pass in stages. None if it is more than that; its graph is then needed as a whole."""

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
