"""RFNet: region-aware fusion for incomplete modalities (Ding, Yu, Yang; ICCV 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models import slabs
from models.backbone import Features, Fused, Mask
from models.blocks import (
    ConvNormAct,
    Encoder,
    MaskedPointwise,
    SeparateDecoder,
    encode_present,
    initialise,
    logits,
    separate_each,
    upsample,
)
from models.layout import long_product, voxels
from models.normalisation import norm_act
from models.region_sum import region_sum
from models.task import Task

LEVELS = 4
AREA_EPS = 1e-7


class ProbabilityHead(nn.Module):
    """Class logits of one level from all present features and, above the deepest level, the decoder's own."""

    def __init__(self, modalities: int, width: int, classes: int, deepest: bool) -> None:
        super().__init__()
        self.embedding_layer = nn.ModuleList(
            [
                MaskedPointwise(modalities, width, width // 4),
                ConvNormAct(width // 4, width // 4),
                ConvNormAct(width // 4, width, kernel=1),
            ]
        )
        self.prm_layer = nn.Sequential(
            ConvNormAct(width if deepest else 2 * width, 16, kernel=1), nn.Conv3d(16, classes, 1)
        )

    def forward(self, present: Sequence[Tensor], decoded: Tensor | None, mask: Mask) -> Tensor:
        """present: P times (B, c, d, h, w), decoded (B, c, d, h, w) or None -> logits (B, C, d, h, w)."""
        x = self.embedding_layer[0](present, mask)
        for layer in self.embedding_layer[1:]:
            x = layer(x)
        hidden, last = self.prm_layer
        return logits(last, hidden(x) if decoded is None else hidden(decoded, x))


class ModalityWeights(nn.Module):
    """The MLP of one region: a weight in (0, 1) for every modality from its region descriptors."""

    def __init__(self, modalities: int, width: int) -> None:
        super().__init__()
        self.weight_layer = nn.Sequential(
            nn.Conv3d(modalities * width + 1, 128, 1), nn.LeakyReLU(0.2), nn.Conv3d(128, modalities, 1)
        )

    def forward(self, descriptor: Tensor) -> Tensor:
        """(B, K * c + 1) -> (B, K)."""
        weights: Tensor = self.weight_layer(descriptor[..., None, None, None])
        return weights.flatten(1).sigmoid()


class RegionFusion(nn.Module):
    """The convolutions over the C region features of a level, p_r * sum_k w_{r,k} f_k, which are never concatenated."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.fusion_layer = nn.Sequential(
            ConvNormAct(classes * width, width, kernel=1),
            ConvNormAct(width, width),
            ConvNormAct(width, width // 2, kernel=1),
        )

    def forward(self, present: Sequence[Tensor], regions: Tensor, weights: Tensor) -> Tensor:
        """present: P times (B, c, d, h, w), regions p (B, C, d, h, w), weights w (B, C, P) -> (B, c / 2, d, h, w)."""
        first, *others = self.fusion_layer
        matrix, bias = (first.get_parameter(f"conv.{name}") for name in ("weight", "bias"))
        if slabs.suit(*present):
            made = slabs.region_sum(present, regions, weights, matrix, bias)
            x = slabs.norm_act(made, (len(regions), len(matrix), *regions.shape[2:]))
        else:
            # The norm takes the bias away again: its gradient would be 0.
            x = norm_act(region_sum(present, regions, weights, matrix, bias.detach()))
        for layer in others:
            x = layer(x)
        return x


class RegionAwareFusion(nn.Module):
    """Fuses the modalities of one level, each region (class) with weights of its own."""

    def __init__(self, modalities: int, width: int, classes: int) -> None:
        super().__init__()
        self.modalities = modalities
        self.modal_fusion = nn.ModuleList([ModalityWeights(modalities, width) for _ in range(classes)])
        self.region_fusion = RegionFusion(width, classes)
        self.short_cut = nn.ModuleList(
            [
                MaskedPointwise(modalities, width, width),
                ConvNormAct(width, width),
                ConvNormAct(width, width // 2, kernel=1),
            ]
        )

    def forward(self, present: Sequence[Tensor], regions: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """present: P times (B, c, d, h, w), regions = class probabilities (B, C, d, h, w).

        Gives the halves of the fused feature, each (B, c / 2, d, h, w).
        """
        short_cut = self.short_cut[0](present, mask)
        for layer in self.short_cut[1:]:
            short_cut = layer(short_cut)
        return self.region_fusion(present, regions, self._weights(present, regions, mask)), short_cut

    def _weights(self, present: Sequence[Tensor], regions: Tensor, mask: Mask) -> Tensor:
        """w_{r,k} of the present modalities, (B, C, P). The descriptors mean(f_k p_r) are one product of matrices."""
        there = [k for k, is_there in enumerate(mask) if is_there]
        p = regions.flatten(2)  # (B, C, V)
        area = p.mean(2) + AREA_EPS  # (B, C)
        shares = p / p.shape[2]
        means = torch.stack([long_product(shares, voxels(f)) for f in present], dim=2) / area[..., None, None]
        missing = torch.zeros_like(means[:, :, 0])
        of_each = dict(zip(there, means.unbind(2), strict=True))
        descriptors = torch.cat([*(of_each.get(k, missing) for k in range(self.modalities)), area[..., None]], dim=2)
        weights = torch.stack([mlp(descriptors[:, r]) for r, mlp in enumerate(self.modal_fusion)], dim=1)
        return torch.stack([weights[:, :, k] for k in there], dim=2)


class FusedDecoder(nn.Module):
    """Decoder of any subset of modalities, deepest level first."""

    def __init__(self, modalities: int, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        for level in range(LEVELS - 1, 0, -1):
            width = widths[level - 1]
            self.add_module(f"d{level}_c1", ConvNormAct(widths[level], width))
            self.add_module(f"d{level}_c2", ConvNormAct(2 * width, width))
            self.add_module(f"d{level}_out", ConvNormAct(width, width, kernel=1))
        self.seg_layer = nn.Conv3d(widths[0], classes, 1)
        for level in range(LEVELS, 0, -1):
            width = widths[level - 1]
            self.add_module(f"RFM{level}", RegionAwareFusion(modalities, width, classes))
            self.add_module(
                f"prm_generator{level}", ProbabilityHead(modalities, width, classes, deepest=level == LEVELS)
            )

    def forward(self, features: Features, mask: Mask) -> Fused:
        """Features of at least the modalities in `mask`."""
        x: Sequence[Tensor] = []  # in parts along the channels
        deep: list[Tensor] = []
        for level in range(LEVELS, 0, -1):
            u = self.get_submodule(f"d{level}_c1")(*x, prepare=upsample) if x else None
            of_mask = [f for f, there in zip(features[level - 1], mask, strict=True) if there]
            present = [f for f in of_mask if f is not None]
            of_level = self.get_submodule(f"prm_generator{level}")(present, u, mask)
            # The regions only say where to look: the released training lets no gradient through them.
            x = self.get_submodule(f"RFM{level}")(present, of_level.detach().softmax(1), mask)
            if u is not None:
                x = [self.get_submodule(f"d{level}_c2")(*x, u)]
                x = [self.get_submodule(f"d{level}_out")(*x)]
            deep.insert(0, of_level)
        return Fused(logits=logits(self.get_submodule("seg_layer"), x[0]), feature=x[0], deep=deep)


class RFNet(nn.Module):
    """RFNet for any modalities and classes; sizes of x must be multiples of 8 and at least 16."""

    def __init__(self, task: Task, width: int = 8) -> None:
        super().__init__()
        if width % 8:
            raise ValueError(f"width {width} must be a multiple of 8: the finest level uses a quarter and a half of it")
        self.modalities = task.names
        classes = len(task.labels)
        widths = [width * 2**level for level in range(LEVELS)]
        for name in self.modalities:
            self.add_module(f"{name}_encoder", Encoder(widths))
        self.decoder_fuse = FusedDecoder(len(self.modalities), widths, classes)
        self.decoder_sep = SeparateDecoder(widths, classes)
        initialise(self)

    def encode(self, x: Tensor, mask: Mask) -> Features:
        """See `Backbone.encode`."""
        return encode_present([self.get_submodule(f"{name}_encoder") for name in self.modalities], x, mask)

    def fuse(self, features: Features, mask: Mask) -> Fused:
        """See `Backbone.fuse`."""
        fused: Fused = self.decoder_fuse(features, mask)
        return fused

    def separate(self, features: Features) -> list[Tensor | None]:
        """See `Backbone.separate`."""
        return separate_each(self.decoder_sep, features)
