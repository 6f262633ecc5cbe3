"""What the three networks share: convolution blocks, the encoder, the separate decoder, transformer layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

DROPOUT = 0.1
Padding: TypeAlias = Literal["reflect", "zeros"]

Features: TypeAlias = list[list[Tensor]]
"""`features[level][k]` of shape (B, c_level, d, h, w), finest level first, of all K modalities."""


@dataclass
class Output:
    """What a fused decoder gives."""

    logits: Tensor
    """(B, C, D, H, W)"""
    feature: Tensor
    """(B, width, D, H, W): the decoder feature before the output head."""
    deep: list[Tensor]
    """Logits of the deep supervision heads at their own resolution, finest first, each (B, C, d, h, w)."""


def conv3d(cin: int, cout: int, kernel: int = 3, stride: int = 1, padding_mode: Padding = "reflect") -> nn.Conv3d:
    """Convolution with "same" padding: (B, cin, D, H, W) -> (B, cout, D/stride, H/stride, W/stride)."""
    if kernel == 1:
        # Without the mode: torch would copy the volume to pad it by nothing.
        return nn.Conv3d(cin, cout, 1, stride)
    return nn.Conv3d(cin, cout, kernel, stride, padding=kernel // 2, padding_mode=padding_mode)


def double() -> nn.Upsample:
    """(B, c, D, H, W) -> (B, c, 2D, 2H, 2W)."""
    return nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True)


class ConvNormAct(nn.Module):
    """Convolution, InstanceNorm, LeakyReLU(0.2)."""

    def __init__(self, cin: int, cout: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = conv3d(cin, cout, kernel, stride)
        self.norm = nn.InstanceNorm3d(cout)
        self.act = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, cin, D, H, W) -> (B, cout, D/stride, H/stride, W/stride)."""
        return self.act(self.norm(self.conv(x)))


class NormActConv(nn.Module):
    """InstanceNorm, LeakyReLU(0.2), convolution."""

    def __init__(
        self, cin: int, cout: int, kernel: int = 3, stride: int = 1, padding_mode: Padding = "reflect"
    ) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm3d(cin)
        self.act = nn.LeakyReLU(0.2, inplace=True)
        self.conv = conv3d(cin, cout, kernel, stride, padding_mode)

    def forward(self, x: Tensor) -> Tensor:
        """(B, cin, D, H, W) -> (B, cout, D/stride, H/stride, W/stride)."""
        return self.conv(self.act(self.norm(x)))


Block: TypeAlias = type[ConvNormAct] | type[NormActConv]


class Encoder(nn.Module):
    """Encoder of one modality: per level c1 (stride 2 from level 2 on), then x + c3(c2(x))."""

    def __init__(self, widths: Sequence[int], block: Block) -> None:
        super().__init__()
        self.levels = len(widths)
        # Before the first convolution of a pre-norm encoder there is nothing to normalise.
        self.e1_c1 = block(1, widths[0]) if block is ConvNormAct else conv3d(1, widths[0])
        for level in range(1, self.levels + 1):
            width = widths[level - 1]
            if level > 1:
                self.add_module(f"e{level}_c1", block(widths[level - 2], width, stride=2))
            self.add_module(f"e{level}_c2", block(width, width))
            self.add_module(f"e{level}_c3", block(width, width))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 1, D, H, W) -> one feature a level, finest first."""
        features = []
        for level in range(1, self.levels + 1):
            x = self.get_submodule(f"e{level}_c1")(x)
            x = x + self.get_submodule(f"e{level}_c3")(self.get_submodule(f"e{level}_c2")(x))
            features.append(x)
        return features


class SeparateDecoder(nn.Module):
    """U-Net decoder of one modality alone, with weights that all modalities share."""

    def __init__(self, widths: Sequence[int], classes: int, block: Block) -> None:
        super().__init__()
        self.levels = len(widths)
        self.up = double()
        for level in range(self.levels - 1, 0, -1):
            width = widths[level - 1]
            self.add_module(f"d{level}_c1", block(widths[level], width))
            self.add_module(f"d{level}_c2", block(2 * width, width))
            self.add_module(f"d{level}_out", block(width, width, kernel=1))
        self.seg_layer = conv3d(widths[0], classes, kernel=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """One modality's encoder features, finest first -> logits (B, C, D, H, W)."""
        x = features[self.levels - 1]
        for level in range(self.levels - 1, 0, -1):
            u = self.get_submodule(f"d{level}_c1")(self.up(x))
            x = self.get_submodule(f"d{level}_c2")(torch.cat([u, features[level - 1]], dim=1))
            x = self.get_submodule(f"d{level}_out")(x)
        return self.seg_layer(x)


class SelfAttention(nn.Module):
    """Multi-head self-attention with its full matrix, scale (D / heads)^-1/2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_drop = nn.Dropout(DROPOUT)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, N, D), visible (B, N, N) bool: which tokens (columns) a token (row) sees; None: all.

        Gives the same shape as x, and the attention weights (B, heads, N, N).
        """
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * (D // self.heads) ** -0.5
        if visible is not None:
            scores = scores.masked_fill(~visible[:, None], float("-inf"))
        weights = self.attn_drop(scores.softmax(-1))
        seen = (weights @ v).transpose(1, 2).reshape(B, N, D)
        return self.proj_drop(self.proj(seen)), weights


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(hidden, width), nn.Dropout(DROPOUT)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.net(x)


class PreNorm(nn.Module):
    """LayerNorm, then `fn`."""

    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x: Tensor, *arguments: Tensor | None) -> Any:
        """x (B, N, D) -> what `fn` gives."""
        return self.fn(self.norm(x), *arguments)


class AttentionLayer(nn.Module):
    """x + attention(LayerNorm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.fn = PreNorm(width, SelfAttention(width, heads))

    def forward(self, x: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `SelfAttention`."""
        seen, weights = self.fn(x, visible)
        return x + seen, weights


class MLPLayer(nn.Module):
    """x + MLP(LayerNorm(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fn = PreNorm(width, MLP(width, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return x + self.fn(x)


class Transformer(nn.Module):
    """`depth` layers of self-attention and MLP."""

    def __init__(self, width: int, depth: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.cross_attention_list = nn.ModuleList([AttentionLayer(width, heads) for _ in range(depth)])
        self.cross_ffn_list = nn.ModuleList([MLPLayer(width, hidden) for _ in range(depth)])

    def forward(self, x: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, N, D), visible as in `SelfAttention` -> the same shape, and the first layer's (B, heads, N, N)."""
        of_layers = []
        for attention, mlp in zip(self.cross_attention_list, self.cross_ffn_list, strict=True):
            x, weights = attention(x, visible)
            x = mlp(x)
            of_layers.append(weights)
        return x, of_layers[0]


def zero_missing(x: Tensor, masks: Tensor) -> Tensor:
    """x (B, K, ...), masks (B, K) bool -> x with zeros where a modality is missing."""
    return x * masks.reshape(*masks.shape, *[1] * (x.ndim - 2))


def mask_features(features: Sequence[Tensor], masks: Tensor) -> list[Tensor]:
    """The K features of one level, each (B, c, d, h, w), with zeros where masks (B, K) say missing."""
    return [f * masks[:, k, None, None, None, None] for k, f in enumerate(features)]


def initialise(network: nn.Module) -> None:
    """Conv3d weights by `kaiming_normal_` with torch's defaults; everything else stays as torch makes it."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight)
