"""M2FTrans (Shi et al., 2024), straight from its formulas."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import (
    DROPOUT,
    ConvNormAct,
    Encoder,
    Features,
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
DEPTH = 3
HEADS = 8
HIDDEN = 4096
REFINED = (5, 4)
"""The levels whose fused feature is refined by channel attention; the others are fused by convolution."""
REFINEMENTS = 2


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, c, d, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, d, h, w) -> the same."""
        return super().forward(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class Projection(nn.Module):
    """Depthwise-separable convolution, zero-padded."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(width, width, 1)
        self.norm1 = ChannelNorm(width)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1, groups=width)
        self.norm2 = ChannelNorm(width)
        self.conv3 = nn.Conv3d(width, width, 1)
        self.norm3 = ChannelNorm(width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, d, h, w) -> the same."""
        x = self.act(self.norm1(self.conv1(x)))
        x = self.act(self.norm2(self.conv2(x)))
        return self.norm3(self.conv3(x))


class FeedForward(nn.Module):
    """1x1x1 convolution to four times the channels, a zero-padded one in `width` groups, 1x1x1 back, plus identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pwconv1 = nn.Conv3d(width, 4 * width, 1)
        self.norm1 = ChannelNorm(4 * width)
        self.dwconv = nn.Conv3d(4 * width, 4 * width, 3, padding=1, groups=width)
        self.norm2 = ChannelNorm(4 * width)
        self.pwconv2 = nn.Conv3d(4 * width, width, 1)
        self.norm3 = ChannelNorm(width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, d, h, w) -> the same."""
        y = self.act(self.norm1(self.pwconv1(x)))
        y = self.act(self.norm2(self.dwconv(y)))
        return self.act(x + self.norm3(self.pwconv2(y)))


class ChannelAttention(nn.Module):
    """Attention of a feature's channels to the channels of all present modalities: voxels are what is compared."""

    def __init__(self, names: Sequence[str], width: int) -> None:
        super().__init__()
        self.names = tuple(names)
        self.query_map = Projection(width)
        for name in names:
            self.add_module(f"key_map_{name}", Projection(width))
            self.add_module(f"value_map_{name}", Projection(width))
        self.out_project = Projection(width)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, query: Tensor, features: Sequence[Tensor], masks: Tensor) -> Tensor:
        """query (B, c, d, h, w), features K x (B, c, d, h, w), masks (B, K) -> what is added to the query."""
        width = query.shape[1]
        q = self.query_map(query).flatten(2)  # (B, c, V)
        keys = [self.get_submodule(f"key_map_{name}")(f) for name, f in zip(self.names, features, strict=True)]
        values = [self.get_submodule(f"value_map_{name}")(f) for name, f in zip(self.names, features, strict=True)]
        k = torch.cat(keys, dim=1).flatten(2)  # (B, K * c, V)
        v = torch.cat(values, dim=1).flatten(2)
        scores = q @ k.transpose(1, 2) * q.shape[2] ** -0.5  # (B, c, K * c)
        visible = masks.repeat_interleave(width, dim=1)[:, None]
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        return self.dropout(self.out_project((weights @ v).reshape(query.shape)))


class RefinementLayer(nn.Module):
    """Refines the fused feature, then, unless it is the last layer, the modalities'."""

    def __init__(self, names: Sequence[str], width: int, last: bool) -> None:
        super().__init__()
        self.cross_attn = ChannelAttention(names, width)
        self.ffn1 = FeedForward(width)
        self.ffn2 = None if last else FeedForward(width)

    def forward(self, query: Tensor, features: Sequence[Tensor], masks: Tensor) -> tuple[Tensor, list[Tensor]]:
        """query (B, c, d, h, w), features K x (B, c, d, h, w), masks (B, K) -> both, refined."""
        query = self.ffn1(query + self.cross_attn(query, features, masks))
        refined = list(features) if self.ffn2 is None else [self.ffn2(f) for f in features]
        return query, refined


class Refinement(nn.Module):
    """The fused feature of a deep level, refined against the modalities'."""

    def __init__(self, names: Sequence[str], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([RefinementLayer(names, width, n == REFINEMENTS - 1) for n in range(REFINEMENTS)])

    def forward(self, query: Tensor, features: Sequence[Tensor], masks: Tensor) -> Tensor:
        """query (B, c, d, h, w), features K x (B, c, d, h, w), masks (B, K) -> (B, c, d, h, w)."""
        for layer in self.layers:
            query, features = layer(query, features, masks)
        return query


class ModalityFusion(nn.Module):
    """Fuses the K features of one level by convolution."""

    def __init__(self, modalities: int, width: int) -> None:
        super().__init__()
        self.fusion_layer = nn.Sequential(
            ConvNormAct(modalities * width, width, kernel=1),
            ConvNormAct(width, width),
            ConvNormAct(width, width, kernel=1),
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """K x (B, c, d, h, w) -> (B, c, d, h, w)."""
        return self.fusion_layer(torch.cat(list(features), dim=1))


class LogitHead(nn.Module):
    """Class logits of one level."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.prm_layer = nn.Sequential(ConvNormAct(width, 16, kernel=1), conv3d(16, classes, kernel=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, d, h, w) -> (B, C, d, h, w)."""
        return self.prm_layer(x)


class FusedDecoder(nn.Module):
    """Decoder of any subset of modalities, deepest level first."""

    def __init__(self, names: Sequence[str], widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.up = double()
        for level in range(LEVELS, 0, -1):
            width = widths[level - 1]
            if level < LEVELS:
                self.add_module(f"d{level}_c1", ConvNormAct(widths[level], width))
            self.add_module(f"d{level}_c2", ConvNormAct(2 * width, width))
            self.add_module(f"d{level}_out", ConvNormAct(width, width, kernel=1))
            self.add_module(f"prm_fusion{level}", LogitHead(width, classes))
            if level in REFINED:
                self.add_module(f"CT{level}", Refinement(names, width))
            else:
                self.add_module(f"RFM{level}", ModalityFusion(len(names), width))
        self.seg_layer = conv3d(widths[0], classes, kernel=1)

    def forward(self, gated: Features, fusion: Tensor, masks: Tensor) -> Output:
        """Gated features, the fusion tokens' volume (B, c, d, h, w) at the deepest level, masks (B, K) bool."""
        x = fusion
        deep: list[Tensor] = []
        for level in range(LEVELS, 0, -1):
            u = x if level == LEVELS else self.get_submodule(f"d{level}_c1")(self.up(x))
            deep.insert(0, self.get_submodule(f"prm_fusion{level}")(u))
            if level in REFINED:
                fused = self.get_submodule(f"CT{level}")(u, gated[level - 1], masks)
            else:
                fused = self.get_submodule(f"RFM{level}")(gated[level - 1])
            x = self.get_submodule(f"d{level}_c2")(torch.cat([fused, u], dim=1))
            x = self.get_submodule(f"d{level}_out")(x)
        return Output(self.seg_layer(x), x, deep)


class Bottleneck(nn.Module):
    """The transformer over the modalities' and the fusion tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trans_bottle = Transformer(width, DEPTH, HEADS, HIDDEN)

    def forward(self, x: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, (K + 1) * T, D), fusion tokens last, masks (B, K) -> the same, and the gate (B, K, T).

        The gate is how much the fusion tokens saw of every token in the first layer. It is detached.
        """
        count = x.shape[1] // (masks.shape[1] + 1)
        x, weights = self.trans_bottle(x, visible_tokens(masks, count))
        of_fusion = weights[:, :, -count:, :-count].detach().sum((1, 2))
        return x, of_fusion.reshape(*masks.shape, count)


def visible_tokens(masks: Tensor, count: int) -> Tensor:
    """masks (B, K), `count` tokens a group -> (B, (K + 1) * count, (K + 1) * count) bool.

    A modality's tokens see their own modality; the fusion tokens see every present modality and themselves.
    """
    groups = torch.eye(masks.shape[1] + 1, dtype=torch.bool, device=masks.device).repeat(len(masks), 1, 1)
    groups[:, -1, :-1] = masks
    return groups.repeat_interleave(count, dim=1).repeat_interleave(count, dim=2)


class M2FTrans(nn.Module):
    """M2FTrans for patches of exactly `patch_size`: its positions are learned."""

    def __init__(self, modalities: Sequence[str], classes: int, patch_size: tuple[int, ...], width: int = 8) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        widths = [width * 2**level for level in range(LEVELS)]
        tokens = prod(p // 2 ** (LEVELS - 1) for p in patch_size)
        self.pos = nn.Parameter(torch.zeros(1, (len(self.modalities) + 1) * tokens, widths[-1]))
        self.fusion = nn.Parameter(torch.randn(1, tokens, widths[-1]))
        for name in self.modalities:
            self.add_module(f"{name}_encoder", Encoder(widths, ConvNormAct))
        self.Bottleneck = Bottleneck(widths[-1])
        self.decoder_fusion = FusedDecoder(self.modalities, widths, classes)
        self.decoder_sep = SeparateDecoder(widths, classes, ConvNormAct)
        initialise(self)

    def encode(self, x: Tensor, masks: Tensor) -> Features:
        """x (B, K, D, H, W), masks (B, K) bool -> features of all modalities."""
        x = zero_missing(x, masks)
        columns = [self.get_submodule(f"{name}_encoder")(x[:, k : k + 1]) for k, name in enumerate(self.modalities)]
        return [list(level) for level in zip(*columns, strict=True)]

    def fuse(self, features: Features, masks: Tensor) -> Output:
        """The fused path of the modalities in masks (B, K) bool."""
        masked = [mask_features(level, masks) for level in features]
        batch, width, *grid = masked[-1][0].shape
        tokens = [f.flatten(2).transpose(1, 2) for f in masked[-1]]
        sequence = torch.cat([*tokens, self.fusion.expand(batch, -1, -1)], dim=1) + self.pos
        sequence, gate = self.Bottleneck(sequence, masks)
        groups = sequence.chunk(len(self.modalities) + 1, dim=1)
        *masked[-1], fusion = [g.transpose(1, 2).reshape(batch, width, *grid) for g in groups]
        gate = gate.reshape(*masks.shape, *grid)
        gated = []
        for level in masked:
            at_level = F.interpolate(gate, size=level[0].shape[2:], mode="nearest")
            gated.append([f * at_level[:, k : k + 1] for k, f in enumerate(level)])
        return self.decoder_fusion(gated, fusion, masks)

    def separate(self, features: Features, k: int) -> Tensor:
        """Logits (B, C, D, H, W) of modality k alone."""
        return self.decoder_sep([level[k] for level in features])
