"""What is trained for: PASSION, nothing at all, or another rule against modalities that lag. One entry each here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from training.errors import UserError
from training.methods.base import Method
from training.methods.dwa import Dwa
from training.methods.ogm_ge import OgmGe
from training.methods.passion import Passion
from training.methods.plain import Plain
from training.methods.pmr import Pmr
from training.passion.objective import Switches

__all__ = ["METHODS", "Method", "MethodEntry", "build_method"]


@dataclass(frozen=True)
class MethodEntry:
    """A method's name in `TrainConfig.method` leads here."""

    make: Callable[[Sequence[str], int], Method]
    """From the modalities' names and the number of classes."""
    summary: str
    """What it is, and who published it."""


def _ablation(switches: Switches, summary: str) -> MethodEntry:
    return MethodEntry(lambda names, _classes: Passion(names, switches), summary)


METHODS: dict[str, MethodEntry] = {
    "none": MethodEntry(lambda _names, _classes: Plain(), "the backbone's own loss: fuse + prm + sum_k sep_k"),
    "passion": _ablation(Switches(), "all of PASSION (Shi et al., ACM MM 2024)"),
    "passion-pixel": _ablation(
        Switches(semantic=False, task_wise=False, gradient_wise=False), "ablation: pixel-wise distillation only"
    ),
    "passion-semantic": _ablation(
        Switches(pixel=False, task_wise=False, gradient_wise=False), "ablation: semantic-wise distillation only"
    ),
    "passion-both": _ablation(Switches(task_wise=False, gradient_wise=False), "ablation: both distillations"),
    "passion-both-task": _ablation(
        Switches(gradient_wise=False), "ablation: both distillations, task-wise regularisation"
    ),
    "passion-both-gradient": _ablation(
        Switches(task_wise=False), "ablation: both distillations, gradient-wise regularisation"
    ),
    "ogm-ge": MethodEntry(
        lambda names, _classes: OgmGe(names), "gradient modulation of the encoders (Peng et al., CVPR 2022)"
    ),
    "pmr": MethodEntry(Pmr, "prototypical modal rebalance (Fan et al., CVPR 2023)"),
    "dwa": MethodEntry(
        lambda names, _classes: Dwa(names), "separate losses weighted by rate of descent (Liu et al., CVPR 2019)"
    ),
}


def build_method(name: str, modalities: Sequence[str], classes: int) -> Method:
    """A fresh method. Raises `UserError` for an unknown name."""
    if name not in METHODS:
        raise UserError(f"no method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name].make(modalities, classes)
