"""`Passion`: self-distillation and preference-aware regularisation, whole or in the parts of the paper's ablation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from training.passion.objective import Coefficients, Switches, Terms
from training.passion.preference import Preference, relative_preference
from training.passion.staged import Weigh


class Passion:
    """Shi et al., ACM MM 2024. beta follows the epochs' mean distances even where `switches` leave it out of the loss,
    so that every ablation's log shows which modalities lag."""

    distils = True

    def __init__(self, modalities: Sequence[str], switches: Switches) -> None:
        self.modalities = tuple(modalities)
        self.switches = switches
        self.preference = Preference.start(len(self.modalities))

    def total(self, losses: Terms, weight: Tensor) -> Tensor:
        """See `Method.total`."""
        self.preference.record(losses.dist, losses.mask)
        return losses.passion(self.preference.beta.to(weight), weight, self.switches)

    def weigher(self, weight: Tensor) -> Weigh:
        """See `Method.weigher`."""
        beta = self.preference.beta.to(weight)
        return lambda dist, mask: Coefficients.passion(relative_preference(dist, mask), beta, weight, self.switches)

    def after_backward(self, _network: nn.Module) -> None:
        """Nothing to change: beta already weighs the losses."""

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """Mean distance of each modality's student from its teacher; beta follows."""
        return {"dist": self._by_modality(self.preference.update(epoch))}

    def figures(self) -> dict[str, Any]:
        """beta by modality, and eta."""
        return {"beta": self._by_modality(self.preference.beta), "eta": self.preference.eta}

    def state(self) -> dict[str, Any]:
        """See `Method.state`."""
        return self.preference.state()

    def restore(self, state: dict[str, Any]) -> None:
        """See `Method.restore`."""
        self.preference = Preference.restore(state)

    def _by_modality(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self.modalities, values.tolist(), strict=True))
