"""The registry of backbones: one file each, one line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from models.backbones.rfnet import RFNet
from models.task import Task

BACKBONES: dict[str, Callable[[Sequence[str], int, int], nn.Module]] = {
    "rfnet": RFNet,
}

DIVISOR: dict[str, int] = {"rfnet": 8}
"""Patch sizes must be multiples of this: 2 to the number of halvings."""


def build(name: str, task: Task, width: int) -> nn.Module:
    """A fresh network with random weights. Raises ValueError for an unknown name or a patch that does not fit."""
    if name not in BACKBONES:
        raise ValueError(f"no backbone {name!r}: choose one of {', '.join(BACKBONES)}")
    divisor = DIVISOR[name]
    if any(p % divisor or p < 2 * divisor for p in task.patch_size):
        raise ValueError(
            f"patch size {task.patch_size} does not fit {name}: "
            f"use multiples of {divisor}, at least {2 * divisor}, per axis"
        )
    return BACKBONES[name](task.names, len(task.labels), width)
