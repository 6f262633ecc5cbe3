"""mmFormer (Zhang et al.; MICCAI 2022), straight from its formulas."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from .blocks import (
    Encoder,
    Features,
    NormActConv,
    Output,
    SeparateDecoder,
    Transformer,
    conv3d,
    double,
    initialise,
    mask_features,
    zero_missing,
)

LEVELS = 5
TOKEN_WIDTH = 512
HEADS = 8
HIDDEN = 4096


class Fusion(nn.Module):
    """Fuses the K features of one level by convolution; its 3x3x3 convolution pads with zeros."""

    def __init__(self, modalities: int, width: int) -> None:
        super().__init__()
        self.fusion_layer = nn.Sequential(
            NormActConv(modalities * width, width, kernel=1),
            NormActConv(width, width, padding_mode="zeros"),
            NormActConv(width, width, kernel=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, K * c, d, h, w) -> (B, c, d, h, w)."""
        return self.fusion_layer(x)


class FusedDecoder(nn.Module):
    """Decoder of any subset of modalities, deepest level first."""

    def __init__(self, modalities: int, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.up = double()
        for level in range(LEVELS - 1, 0, -1):
            width = widths[level - 1]
            self.add_module(f"d{level}_c1", NormActConv(widths[level], width))
            self.add_module(f"d{level}_c2", NormActConv(2 * width, width))
            self.add_module(f"d{level}_out", NormActConv(width, width, kernel=1))
        for level in range(LEVELS, 0, -1):
            self.add_module(f"RFM{level}", Fusion(modalities, widths[level - 1]))
        # The head on what level l gives is named after the finer level that goes on from it.
        for level in range(LEVELS, 1, -1):
            self.add_module(f"seg_d{level - 1}", conv3d(widths[level - 1], classes, kernel=1))
        self.seg_layer = conv3d(widths[0], classes, kernel=1)

    def forward(self, features: Features, bottleneck: Tensor, masks: Tensor) -> Output:
        """Encoder features of all modalities, bottleneck (B, K * c, d, h, w), masks (B, K) bool."""
        x = self.get_submodule(f"RFM{LEVELS}")(bottleneck)
        deep: list[Tensor] = []
        for level in range(LEVELS - 1, 0, -1):
            deep.insert(0, self.get_submodule(f"seg_d{level}")(x))
            u = self.get_submodule(f"d{level}_c1")(self.up(x))
            masked = torch.cat(mask_features(features[level - 1], masks), dim=1)
            fused = self.get_submodule(f"RFM{level}")(masked)
            x = self.get_submodule(f"d{level}_c2")(torch.cat([fused, u], dim=1))
            x = self.get_submodule(f"d{level}_out")(x)
        return Output(self.seg_layer(x), x, deep)


class MMFormer(nn.Module):
    """mmFormer for patches of exactly `patch_size`: its positions are learned."""

    def __init__(self, modalities: Sequence[str], classes: int, patch_size: tuple[int, ...], width: int = 8) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        count = len(self.modalities)
        widths = [width * 2**level for level in range(LEVELS)]
        self.grid = tuple(p // 2 ** (LEVELS - 1) for p in patch_size)
        for name in self.modalities:
            self.add_module(f"{name}_encoder", Encoder(widths, NormActConv))
            self.add_module(f"{name}_encode_conv", conv3d(widths[-1], TOKEN_WIDTH, kernel=1))
            self.register_parameter(f"{name}_pos", nn.Parameter(torch.zeros(1, prod(self.grid), TOKEN_WIDTH)))
            self.add_module(f"{name}_transformer", Transformer(TOKEN_WIDTH, 1, HEADS, HIDDEN))
        self.multimodal_transformer = Transformer(TOKEN_WIDTH, 1, HEADS, HIDDEN)
        self.multimodal_decode_conv = conv3d(count * TOKEN_WIDTH, count * widths[-1], kernel=1)
        self.decoder_fuse = FusedDecoder(count, widths, classes)
        self.decoder_sep = SeparateDecoder(widths, classes, NormActConv)
        initialise(self)

    def encode(self, x: Tensor, masks: Tensor) -> Features:
        """x (B, K, D, H, W), masks (B, K) bool -> features of all modalities.

        After the encoders' five levels comes a sixth: each modality's own tokens, as volumes (B, 512, d, h, w).
        """
        x = zero_missing(x, masks)
        columns = []
        for k, name in enumerate(self.modalities):
            column = self.get_submodule(f"{name}_encoder")(x[:, k : k + 1])
            volume = self.get_submodule(f"{name}_encode_conv")(column[-1])
            tokens = volume.flatten(2).transpose(1, 2) + self.get_parameter(f"{name}_pos")
            tokens, _ = self.get_submodule(f"{name}_transformer")(tokens)
            columns.append([*column, tokens.transpose(1, 2).reshape(volume.shape)])
        return [list(level) for level in zip(*columns, strict=True)]

    def fuse(self, features: Features, masks: Tensor) -> Output:
        """The fused path of the modalities in masks (B, K) bool."""
        intra = mask_features(features[LEVELS], masks)
        tokens = torch.cat([volume.flatten(2).transpose(1, 2) for volume in intra], dim=1)  # (B, K * N, 512)
        positions = torch.cat([self.get_parameter(f"{name}_pos") for name in self.modalities], dim=1)
        # No attention mask: a missing modality's tokens enter as zeros plus positions.
        tokens, _ = self.multimodal_transformer(tokens + positions)
        # Rows of K consecutive tokens, not of K modalities: the published weights depend on it.
        rows = tokens.reshape(len(tokens), *self.grid, len(self.modalities) * TOKEN_WIDTH)
        bottleneck = self.multimodal_decode_conv(rows.permute(0, 4, 1, 2, 3).contiguous())
        return self.decoder_fuse(features, bottleneck, masks)

    def separate(self, features: Features, k: int) -> Tensor:
        """Logits (B, C, D, H, W) of modality k alone."""
        return self.decoder_sep([level[k] for level in features[:LEVELS]])
