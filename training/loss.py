"""`Loss`: from a batch to the number to minimise, as the one module that DistributedDataParallel can wrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.layout import in_fast_layout
from models.precision import InPrecision, weights_stay
from training.loader import Batch
from training.methods import Method
from training.methods.base import settle
from training.passion.captured import Captured
from training.passion.objective import Coefficients, Terms, terms
from training.passion.staged import Weigh, assigning, staged, with_gradients
from training.ranks import Ranks


class Outcome(NamedTuple):
    """What a batch gives."""

    total: Tensor
    """The loss, a scalar with gradient. Nothing else of an outcome has one, so what it does not use is unused."""
    losses: Terms
    """Without gradient and samples."""
    given: list[Tensor]
    """The batch's part of each of the method's sums, where the loss did not wait for them; else empty."""


class Loss(nn.Module):
    """The loss of a batch by the run's method, on the device of the network."""

    def __init__(
        self,
        network: Any,
        method: Method,
        modal_weight: Tensor,
        classes: int,
        ranks: Ranks,
        precision: str = "float32",
        graphs: bool = False,
    ) -> None:
        """`graphs`: whether steps of one sample are recorded as CUDA graphs, see `Captured`."""
        super().__init__()
        self.network = network
        self._computing = InPrecision(network, precision)
        self.method = method
        self.modal_weight = modal_weight
        self.classes = classes
        self.ranks = ranks
        self._captured: Captured | None = None
        if graphs:
            parameters, modalities = list(network.parameters()), len(modal_weight)
            self._captured = Captured(self._computing, parameters, modalities, classes, method.distils)

    def forward(
        self, batch: Batch, counted: Sequence[int] | None = None, warm_up: bool = False, settled: bool = False
    ) -> Outcome:
        """The batch's part of a step's loss; `counted` as in `terms`.

        Where the method waits for sums over all samples of the step, they are those of this batch on every rank, unless
        they are `settled`. A batch may be empty: a rank without a sample in the last step of an epoch. Its loss is 0.
        """
        if batch.masks and not warm_up and self.method.coefficients(self.modal_weight) is not None:
            return self._in_stages(batch, counted, settled)
        losses = self.terms(batch, counted, warm_up)
        given: list[Tensor] = []
        if warm_up:
            total = losses.warm_up(self.modal_weight)
        else:
            if not self.method.waits:
                given = [self.method.give(losses, number) for number in range(self.method.sums)]
            elif not settled:
                settle(self.method, losses, self.ranks.sum)
            total = self.method.total(losses, self.modal_weight)
        if not batch.masks:
            # DistributedDataParallel reduces after a backward pass, so even nothing needs one.
            total = total + 0 * next(self.network.parameters()).sum()
        return Outcome(total, losses.figures(), given)

    def _in_stages(self, batch: Batch, counted: Sequence[int] | None, settled: bool) -> Outcome:
        """As `forward`, in a fraction of the memory; the total's gradients are known before its backward pass."""

        def weigh(losses: Terms) -> Coefficients:
            if self.method.waits and not settled:
                settle(self.method, losses, self.ranks.sum)
            weights = self.method.coefficients(self.modal_weight)
            assert weights is not None
            return weights

        with weights_stay():
            return self._undone(batch, counted, weigh)

    def _undone(self, batch: Batch, counted: Sequence[int] | None, weigh: Weigh) -> Outcome:
        x, labels = self._moved(batch)
        parameters = list(self.network.parameters())
        hand_out = with_gradients
        if self._captured is not None and len(batch.masks) == 1 and counted is None:
            hand_out = assigning
            losses, gradients = self._captured(x, labels, batch.masks[0], batch.present[0], weigh)
        else:
            losses, gradients = staged(
                self._computing,
                parameters,
                x,
                labels,
                batch.masks,
                self.classes,
                weigh,
                present=batch.present,
                distil=self.method.distils,
                counted=counted,
            )
        total = hand_out(self.method.total(losses, self.modal_weight), parameters, gradients)
        given = [] if self.method.waits else [self.method.give(losses, number) for number in range(self.method.sums)]
        return Outcome(total, losses, given)

    def terms(self, batch: Batch, counted: Sequence[int] | None = None, warm_up: bool = False) -> Terms:
        """Every loss of a batch, unweighted."""
        if not batch.masks:
            return Terms.empty(len(self.modal_weight), self.modal_weight.device)
        return terms(
            self._computing,
            *self._moved(batch),
            batch.masks,
            self.classes,
            present=batch.present,
            distil=self.method.distils and not warm_up,
            counted=counted,
        )

    def _moved(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images and labels on the network's device."""
        device = self.modal_weight.device
        return in_fast_layout(batch.x.to(device, non_blocking=True)), batch.labels.to(device, non_blocking=True)
