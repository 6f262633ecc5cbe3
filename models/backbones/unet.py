"""A plain 3-D U-Net over the mean of the present modalities' features: a light model, and the example of a backbone.

The decoder is that of the 3-D U-Net (Cicek et al.; MICCAI 2016). Features of different modalities meet by averaging, as
in HeMIS (Havaei et al.; MICCAI 2016), which makes every subset of modalities an input of the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from models.backbone import Features, Fused, Mask
from models.blocks import (
    ConvNormAct,
    Encoder,
    SeparateDecoder,
    encode_present,
    initialise,
    logits,
    separate_each,
    upsample,
)
from models.task import Task

LEVELS = 4


def mean_of_present(features: Sequence[Tensor | None], mask: Mask) -> Tensor:
    """One level's features, each (B, c, d, h, w), averaged over the modalities in `mask` alone.

    Raises ValueError for a modality that was not encoded: the mean of the others would be another subset's.
    """
    present = [f for f, there in zip(features, mask, strict=True) if there and f is not None]
    if len(present) != sum(mask):
        raise ValueError(f"the mask of the fused path {tuple(mask)} has a modality that was not encoded")
    return reduce(torch.add, present) / len(present)


class FusedDecoder(nn.Module):
    """U-Net decoder of one fused feature per level, deepest first, with a deep supervision head above the finest."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        for level in range(LEVELS - 1, 0, -1):
            width = widths[level - 1]
            self.add_module(f"d{level}_up", ConvNormAct(widths[level], width, kernel=1))
            self.add_module(f"d{level}_c1", ConvNormAct(2 * width, width))
            self.add_module(f"d{level}_c2", ConvNormAct(width, width))
        for level in range(LEVELS, 1, -1):
            self.add_module(f"head{level}", nn.Conv3d(widths[level - 1], classes, 1))
        self.seg_layer = nn.Conv3d(widths[0], classes, 1)

    def forward(self, fused: Sequence[Tensor]) -> Fused:
        """One feature (B, c, d, h, w) per level, finest first."""
        x = fused[-1]
        deep: list[Tensor] = []
        for level in range(LEVELS - 1, 0, -1):
            deep.insert(0, logits(self.get_submodule(f"head{level + 1}"), x))
            # The width is halved before upsampling: an eighth of the work, and the wide volume never exists.
            u = upsample(self.get_submodule(f"d{level}_up")(x))
            x = self.get_submodule(f"d{level}_c1")(u, fused[level - 1])
            x = self.get_submodule(f"d{level}_c2")(x)
        return Fused(logits=logits(self.seg_layer, x), feature=x, deep=deep)


class UNet(nn.Module):
    """U-Net for any modalities and classes; sizes of x must be multiples of 8 and at least 16."""

    def __init__(self, task: Task, width: int = 8) -> None:
        super().__init__()
        self.modalities = task.names
        classes = len(task.labels)
        widths = [width * 2**level for level in range(LEVELS)]
        for name in self.modalities:
            self.add_module(f"{name}_encoder", Encoder(widths))
        self.decoder_fuse = FusedDecoder(widths, classes)
        self.decoder_sep = SeparateDecoder(widths, classes)
        initialise(self)

    def encode(self, x: Tensor, mask: Mask) -> Features:
        """See `Backbone.encode`."""
        return encode_present([self.get_submodule(f"{name}_encoder") for name in self.modalities], x, mask)

    def fuse(self, features: Features, mask: Mask) -> Fused:
        """See `Backbone.fuse`."""
        fused: Fused = self.decoder_fuse([mean_of_present(level, mask) for level in features])
        return fused

    def separate(self, features: Features) -> list[Tensor | None]:
        """See `Backbone.separate`."""
        return separate_each(self.decoder_sep, features)
