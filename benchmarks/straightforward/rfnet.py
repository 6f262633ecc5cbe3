"""RFNet (Ding, Yu, Yang; ICCV 2021), straight from its formulas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .blocks import (
    ConvNormAct,
    Encoder,
    Features,
    Output,
    SeparateDecoder,
    conv3d,
    double,
    initialise,
    mask_features,
    zero_missing,
)

LEVELS = 4


class ProbabilityHead(nn.Module):
    """Class logits of one level from all features and, above the deepest level, the decoder's own."""

    def __init__(self, modalities: int, width: int, classes: int, deepest: bool) -> None:
        super().__init__()
        self.embedding_layer = nn.Sequential(
            ConvNormAct(modalities * width, width // 4, kernel=1),
            ConvNormAct(width // 4, width // 4),
            ConvNormAct(width // 4, width, kernel=1),
        )
        self.prm_layer = nn.Sequential(
            ConvNormAct(width if deepest else 2 * width, 16, kernel=1), conv3d(16, classes, kernel=1)
        )

    def forward(self, features: Sequence[Tensor], decoded: Tensor | None) -> Tensor:
        """features K x (B, c, d, h, w), decoded (B, c, d, h, w) or None -> logits (B, C, d, h, w)."""
        x = self.embedding_layer(torch.cat(list(features), dim=1))
        if decoded is not None:
            x = torch.cat([decoded, x], dim=1)
        return self.prm_layer(x)


class ModalityWeights(nn.Module):
    """The MLP of one region: a weight in (0, 1) for every modality from its region descriptors."""

    def __init__(self, modalities: int, width: int) -> None:
        super().__init__()
        self.weight_layer = nn.Sequential(
            nn.Conv3d(modalities * width + 1, 128, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv3d(128, modalities, 1),
        )

    def forward(self, region_features: Tensor, region: Tensor) -> Tensor:
        """region_features (B, K, c, d, h, w) = f_k * p_r, region (B, 1, d, h, w) = p_r -> (B, K, 1, 1, 1, 1)."""
        area = region.mean((2, 3, 4), keepdim=True) + 1e-7  # (B, 1, 1, 1, 1)
        means = region_features.mean((3, 4, 5), keepdim=True).flatten(1, 2) / area  # (B, K * c, 1, 1, 1)
        weights = self.weight_layer(torch.cat([means, area], dim=1)).sigmoid()
        return weights[:, :, None]


class RegionFusion(nn.Module):
    """The convolutions over the C concatenated region features."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.fusion_layer = nn.Sequential(
            ConvNormAct(classes * width, width, kernel=1),
            ConvNormAct(width, width),
            ConvNormAct(width, width // 2, kernel=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C * c, d, h, w) -> (B, c / 2, d, h, w)."""
        return self.fusion_layer(x)


class RegionAwareFusion(nn.Module):
    """Fuses the modalities of one level, each region (class) with weights of its own."""

    def __init__(self, modalities: int, width: int, classes: int) -> None:
        super().__init__()
        self.modal_fusion = nn.ModuleList([ModalityWeights(modalities, width) for _ in range(classes)])
        self.region_fusion = RegionFusion(width, classes)
        self.short_cut = nn.Sequential(
            ConvNormAct(modalities * width, width, kernel=1),
            ConvNormAct(width, width),
            ConvNormAct(width, width // 2, kernel=1),
        )

    def forward(self, features: Sequence[Tensor], regions: Tensor) -> Tensor:
        """features K x (B, c, d, h, w), regions = class probabilities (B, C, d, h, w) -> (B, c, d, h, w)."""
        stacked = torch.stack(list(features), dim=1)
        fused = []
        for r, weigh in enumerate(self.modal_fusion):
            region = regions[:, r : r + 1]
            region_features = stacked * region[:, None]  # (B, K, c, d, h, w)
            fused.append((weigh(region_features, region) * region_features).sum(1))
        short_cut = self.short_cut(torch.cat(list(features), dim=1))
        return torch.cat([self.region_fusion(torch.cat(fused, dim=1)), short_cut], dim=1)


class FusedDecoder(nn.Module):
    """Decoder of any subset of modalities, deepest level first."""

    def __init__(self, modalities: int, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.up = double()
        for level in range(LEVELS - 1, 0, -1):
            width = widths[level - 1]
            self.add_module(f"d{level}_c1", ConvNormAct(widths[level], width))
            self.add_module(f"d{level}_c2", ConvNormAct(2 * width, width))
            self.add_module(f"d{level}_out", ConvNormAct(width, width, kernel=1))
        self.seg_layer = conv3d(widths[0], classes, kernel=1)
        for level in range(LEVELS, 0, -1):
            width = widths[level - 1]
            self.add_module(f"RFM{level}", RegionAwareFusion(modalities, width, classes))
            self.add_module(f"prm_generator{level}", ProbabilityHead(modalities, width, classes, level == LEVELS))

    def forward(self, features: Features, masks: Tensor) -> Output:
        """Encoder features of all modalities, masks (B, K) bool."""
        deep: list[Tensor] = []
        masked = mask_features(features[LEVELS - 1], masks)
        logits = self.get_submodule(f"prm_generator{LEVELS}")(masked, None)
        x = self.get_submodule(f"RFM{LEVELS}")(masked, logits.detach().softmax(1))
        deep.insert(0, logits)
        for level in range(LEVELS - 1, 0, -1):
            u = self.get_submodule(f"d{level}_c1")(self.up(x))
            masked = mask_features(features[level - 1], masks)
            logits = self.get_submodule(f"prm_generator{level}")(masked, u)
            fused = self.get_submodule(f"RFM{level}")(masked, logits.detach().softmax(1))
            x = self.get_submodule(f"d{level}_c2")(torch.cat([fused, u], dim=1))
            x = self.get_submodule(f"d{level}_out")(x)
            deep.insert(0, logits)
        return Output(self.seg_layer(x), x, deep)


class RFNet(nn.Module):
    """RFNet. `patch_size` is not needed: it is there so that all networks are built alike."""

    def __init__(self, modalities: Sequence[str], classes: int, patch_size: tuple[int, ...], width: int = 8) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        widths = [width * 2**level for level in range(LEVELS)]
        for name in self.modalities:
            self.add_module(f"{name}_encoder", Encoder(widths, ConvNormAct))
        self.decoder_fuse = FusedDecoder(len(self.modalities), widths, classes)
        self.decoder_sep = SeparateDecoder(widths, classes, ConvNormAct)
        initialise(self)

    def encode(self, x: Tensor, masks: Tensor) -> Features:
        """x (B, K, D, H, W), masks (B, K) bool -> features of all modalities."""
        x = zero_missing(x, masks)
        columns = [self.get_submodule(f"{name}_encoder")(x[:, k : k + 1]) for k, name in enumerate(self.modalities)]
        return [list(level) for level in zip(*columns, strict=True)]

    def fuse(self, features: Features, masks: Tensor) -> Output:
        """The fused path of the modalities in masks (B, K) bool."""
        return self.decoder_fuse(features, masks)

    def separate(self, features: Features, k: int) -> Tensor:
        """Logits (B, C, D, H, W) of modality k alone."""
        return self.decoder_sep([level[k] for level in features])
