"""The registry of backbones: one file each, one entry here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from models.backbones.m2ftrans import M2FTrans
from models.backbones.mmformer import MMFormer
from models.backbones.rfnet import RFNet
from models.backbones.unet import UNet
from models.task import Task


@dataclass(frozen=True)
class BackboneEntry:
    """What the registry knows of a backbone without building it."""

    network: Callable[[Task, int], nn.Module]
    """From a task and a width (channels of the finest level) to a `models.backbone.Backbone` with random weights."""
    divisor: int
    """Patch sizes must be multiples of this: 2 to the number of halvings."""
    source: str
    """Where the network was published."""
    fixed: bool = False
    """Whether learned positions tie a network to the patch size of its task."""

    def takes(self, patch: Sequence[int]) -> bool:
        """Whether a patch of this size, in voxels, can be halved as often as the network does."""
        return all(p % self.divisor == 0 and p >= 2 * self.divisor for p in patch)


BACKBONES: dict[str, BackboneEntry] = {
    "rfnet": BackboneEntry(RFNet, 8, "Ding, Yu, Yang; ICCV 2021"),
    "mmformer": BackboneEntry(MMFormer, 16, "Zhang et al.; MICCAI 2022", fixed=True),
    "m2ftrans": BackboneEntry(M2FTrans, 16, "Shi et al., 2024", fixed=True),
    "unet": BackboneEntry(UNet, 8, "U-Net: Cicek et al., MICCAI 2016; averaging: Havaei et al., MICCAI 2016"),
}


def build(name: str, task: Task, width: int) -> nn.Module:
    """A fresh network with random weights. Raises ValueError for an unknown name or a patch that does not fit."""
    if name not in BACKBONES:
        raise ValueError(f"no backbone {name!r}: choose one of {', '.join(BACKBONES)}")
    entry = BACKBONES[name]
    if not entry.takes(task.patch_size):
        raise ValueError(
            f"patch size {task.patch_size} does not fit {name}: "
            f"use multiples of {entry.divisor}, at least {2 * entry.divisor}, per axis"
        )
    return entry.network(task, width)
