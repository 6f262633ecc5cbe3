"""mmFormer: convolutional encoders, intra-modal and inter-modal transformers (Zhang et al.; MICCAI 2022).

Pre-norm: InstanceNorm and LeakyReLU come before every convolution but the first of an encoder. They are written where
a convolution is called, so that what several convolutions read is normalised once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from models.backbone import Features, Fused, Mask
from models.blocks import conv_norm_act, initialise, logits, present_columns, separate_each, upsample
from models.convolution import convolve, pointwise
from models.layout import channel
from models.normalisation import norm_act
from models.recompute import recomputed
from models.task import Task
from models.transformer import Transformer

LEVELS = 5
SCALE = 2 ** (LEVELS - 1)
"""Voxels of a patch per token, along each axis."""
TOKEN_WIDTH = 512
HEADS = 8
HIDDEN = 4096
DROPOUT = 0.1


class Conv(nn.Module):
    """Convolution, 3x3x3 with reflection padding or 1x1x1."""

    def __init__(self, cin: int, cout: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(cin, cout, kernel, stride)

    def forward(
        self,
        *parts: Tensor,
        prepare: Callable[[Tensor], Tensor] | None = None,
        plus: Tensor | None = None,
        normalised: bool = False,
    ) -> Tensor:
        """(B, cin, D, H, W), whole or in parts along the channels -> (B, cout, D/stride, H/stride, W/stride).

        `plus` is added; `normalised` asks for norm and activation then. `prepare` as in `convolve`; only a 3x3x3
        convolution takes it.
        """
        weight, bias, stride = self.conv.weight, self.conv.bias, self.conv.stride[0]
        assert bias is not None
        if normalised:
            return conv_norm_act(parts, weight, bias, stride, prepare=prepare, plus=plus)
        kernel = weight.shape[-1]
        x = pointwise(parts, weight, bias) if kernel == 1 else convolve(parts, weight, bias, stride, prepare=prepare)
        return x if plus is None else plus + x


class ZeroPaddedConv(nn.Module):
    """3x3x3 convolution with zero padding, norm, activation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, D, H, W) -> the same shape."""
        assert self.conv.bias is not None
        return conv_norm_act([x], self.conv.weight, self.conv.bias, border="zero")


class PresentPointwise(nn.Module):
    """1x1x1 convolution over K concatenated features of which only the present ones are given, norm, activation.

    A missing modality's feature is zero and stays zero through norm and activation, so its columns add nothing.
    """

    def __init__(self, modalities: int, width: int) -> None:
        super().__init__()
        self.modalities = modalities
        self.conv = nn.Conv3d(modalities * width, width, 1)

    def forward(self, present: Mapping[int, Tensor]) -> Tensor:
        """Features (B, c, D, H, W) by modality index -> (B, c, D, H, W)."""
        assert self.conv.bias is not None
        weight = present_columns(self.conv.weight, self.modalities, list(present))
        return conv_norm_act(list(present.values()), weight, self.conv.bias)


class Encoder(nn.Module):
    """Convolutional encoder of one modality: per level c1 (stride 2 from level 2 on), then x + c3(c2(x))."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        for level, width in enumerate(widths, 1):
            if level == 1:
                self.e1_c1 = nn.Conv3d(1, width, 3, padding=1, padding_mode="reflect")
            else:
                self.add_module(f"e{level}_c1", Conv(widths[level - 2], width, stride=2))
            self.add_module(f"e{level}_c2", Conv(width, width))
            self.add_module(f"e{level}_c3", Conv(width, width))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 1, D, H, W) -> one feature a level, finest first: the deepest raw, the others normalised and activated.

        All that reads the others begins with norm and activation.
        """
        features = []
        assert self.e1_c1.bias is not None
        x = convolve([x], self.e1_c1.weight, self.e1_c1.bias)
        for level in range(1, LEVELS + 1):
            if level > 1:
                x = self.get_submodule(f"e{level}_c1")(x)
            y = self.get_submodule(f"e{level}_c2")(norm_act(x), normalised=True)
            x = self.get_submodule(f"e{level}_c3")(y, plus=x, normalised=level < LEVELS)
            features.append(x)
        return features


def upsampled(x: Tensor) -> Tensor:
    """Twice the size, normalised and activated."""
    return norm_act(upsample(x))


class Fusion(nn.Module):
    """Fuses the features of one level by convolution."""

    def __init__(self, modalities: int, width: int) -> None:
        super().__init__()
        self.fusion_layer = nn.ModuleList(
            [PresentPointwise(modalities, width), ZeroPaddedConv(width), Conv(width, width, kernel=1)]
        )

    def forward(self, present: Mapping[int, Tensor], normalised: bool = False) -> Tensor:
        """Normalised and activated features (B, c, d, h, w) by modality index -> (B, c, d, h, w).

        `normalised` as in `Conv`.
        """
        first, second, third = self.fusion_layer
        fused: Tensor = third(second(first(present)), normalised=normalised)
        return fused


def _add_decoder_convolutions(decoder: nn.Module, widths: Sequence[int], classes: int) -> None:
    """What the fused and the separate decoder both have: d{l}_c1, d{l}_c2, d{l}_out of every level and seg_layer."""
    for level in range(LEVELS - 1, 0, -1):
        width = widths[level - 1]
        decoder.add_module(f"d{level}_c1", Conv(widths[level], width))
        decoder.add_module(f"d{level}_c2", Conv(2 * width, width))
        decoder.add_module(f"d{level}_out", Conv(width, width, kernel=1))
    decoder.add_module("seg_layer", nn.Conv3d(widths[0], classes, 1))


class FusedDecoder(nn.Module):
    """Decoder of any subset of modalities, deepest level first."""

    def __init__(self, modalities: int, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.modalities = modalities
        _add_decoder_convolutions(self, widths, classes)
        for level in range(LEVELS, 0, -1):
            self.add_module(f"RFM{level}", Fusion(modalities, widths[level - 1]))
            if level > 1:
                # The head on what level l gives is named after the finer level that goes on from it.
                self.add_module(f"seg_d{level - 1}", nn.Conv3d(widths[level - 1], classes, 1))

    def forward(self, features: Features, bottleneck: Tensor, mask: Mask) -> Fused:
        """Encoder features of at least the modalities in `mask`; bottleneck (B, K * c, d, h, w)."""
        x = self.get_submodule(f"RFM{LEVELS}")(dict(enumerate(norm_act(bottleneck).chunk(self.modalities, dim=1))))
        deep: list[Tensor] = []
        for level in range(LEVELS - 1, 0, -1):
            deep.insert(0, logits(self.get_submodule(f"seg_d{level}"), x))
            u = self.get_submodule(f"d{level}_c1")(x, prepare=upsampled, normalised=True)
            fused = self.get_submodule(f"RFM{level}")(chosen(features[level - 1], mask), normalised=True)
            x = self.get_submodule(f"d{level}_c2")(fused, u, normalised=True)
            x = self.get_submodule(f"d{level}_out")(x)
        return Fused(logits=logits(self.get_submodule("seg_layer"), x), feature=x, deep=deep)


class SeparateDecoder(nn.Module):
    """U-Net decoder of one modality alone, with weights that all modalities share. Used in training only."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        _add_decoder_convolutions(self, widths, classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """What `Encoder` gives -> logits (B, C, D, H, W)."""
        x = features[-1]
        for level in range(LEVELS - 1, 0, -1):
            u = self.get_submodule(f"d{level}_c1")(x, prepare=upsampled, normalised=True)
            x = self.get_submodule(f"d{level}_c2")(u, features[level - 1], normalised=True)
            x = self.get_submodule(f"d{level}_out")(x)
        return logits(self.get_submodule("seg_layer"), x)


def chosen(level: Sequence[Tensor | None], mask: Mask) -> dict[int, Tensor]:
    """The features of the modalities in `mask`, by index. Raises ValueError for one that was not encoded."""
    there: dict[int, Tensor] = {}
    for k, feature in enumerate(level):
        if mask[k]:
            if feature is None:
                raise ValueError(f"modality {k} is in the mask of the fused path but was not encoded")
            there[k] = feature
    return there


def tokens_of(volume: Tensor) -> Tensor:
    """(B, D, d, h, w) -> (B, d * h * w, D)."""
    return volume.flatten(2).transpose(1, 2)


class MMFormer(nn.Module):
    """mmFormer for any modalities and classes and for patches of exactly `task.patch_size`, multiples of 16 from 32 up.

    `encode` gives six levels: the five of the encoders and, as a volume (B, 512, d, h, w), the tokens that a modality's
    own transformer makes of the deepest. The tokens do not depend on what else is there, so teacher and students share
    them. The width of the tokens does not depend on `width`.
    """

    def __init__(self, task: Task, width: int = 8) -> None:
        super().__init__()
        self.modalities = task.names
        self.patch_size = task.patch_size
        self.grid = tuple(p // SCALE for p in task.patch_size)
        count, classes = len(self.modalities), len(task.labels)
        widths = [width * 2**level for level in range(LEVELS)]
        for name in self.modalities:
            self.add_module(f"{name}_encoder", Encoder(widths))
            self.add_module(f"{name}_encode_conv", nn.Conv3d(widths[-1], TOKEN_WIDTH, 1))
            self.register_parameter(f"{name}_pos", nn.Parameter(torch.zeros(1, prod(self.grid), TOKEN_WIDTH)))
            self.add_module(f"{name}_transformer", Transformer(TOKEN_WIDTH, 1, HEADS, HIDDEN, DROPOUT))
        self.multimodal_transformer = Transformer(TOKEN_WIDTH, 1, HEADS, HIDDEN, DROPOUT)
        self.multimodal_decode_conv = nn.Conv3d(count * TOKEN_WIDTH, count * widths[-1], 1)
        self.decoder_fuse = FusedDecoder(count, widths, classes)
        self.decoder_sep = SeparateDecoder(widths, classes)
        initialise(self)

    def encode(self, x: Tensor, mask: Mask) -> Features:
        """See `Backbone.encode`. Raises ValueError for a size that is not the patch's."""
        size = tuple(x.shape[2:])
        if size != self.patch_size:
            raise ValueError(f"mmFormer's positions are made for patches of {self.patch_size}: it cannot take {size}")
        features: Features = [[None] * len(self.modalities) for _ in range(LEVELS + 1)]
        for k, name in enumerate(self.modalities):
            if mask[k]:
                of_modality = self.get_submodule(f"{name}_encoder")(channel(x, k))
                of_modality.append(self._intra_modal(name, of_modality[-1]))
                for level, feature in enumerate(of_modality):
                    features[level][k] = feature
        return features

    def fuse(self, features: Features, mask: Mask) -> Fused:
        """See `Backbone.fuse`."""
        fused: Fused = self.decoder_fuse(features, self._inter_modal(chosen(features[LEVELS], mask)), mask)
        return fused

    def separate(self, features: Features) -> list[Tensor | None]:
        """See `Backbone.separate`."""
        return separate_each(self.decoder_sep, features[:LEVELS])

    def _intra_modal(self, name: str, deepest: Tensor) -> Tensor:
        """A modality's deepest feature (B, c, d, h, w) -> its tokens, as a volume (B, 512, d, h, w)."""
        volume = self._project(f"{name}_encode_conv", deepest)
        placed = tokens_of(volume) + self.get_parameter(f"{name}_pos")
        tokens: Tensor = recomputed(self.get_submodule(f"{name}_transformer"), placed)
        return tokens.transpose(1, 2).view_as(volume)

    def _inter_modal(self, intra: Mapping[int, Tensor]) -> Tensor:
        """Token volumes by modality index -> the bottleneck (B, K * c, d, h, w).

        The sequence goes through modality by modality; a missing modality's tokens are zeros, but they have positions,
        and the others see them. Its rows (K * N, 512) are then read as (N, K * 512), not modality by modality: so it is
        in the published network, and its weights depend on it.
        """
        like = tokens_of(next(iter(intra.values())))
        positions = torch.cat([self.get_parameter(f"{name}_pos") for name in self.modalities], dim=1)
        columns = range(len(self.modalities))
        tokens = torch.cat([tokens_of(intra[k]) if k in intra else torch.zeros_like(like) for k in columns], dim=1)
        sequence: Tensor = recomputed(self.multimodal_transformer, tokens + positions)
        volume = sequence.reshape(len(like), like.shape[1], -1).transpose(1, 2).unflatten(2, self.grid)
        return self._project("multimodal_decode_conv", volume)

    def _project(self, name: str, x: Tensor) -> Tensor:
        """The 1x1x1 convolution of that name."""
        return pointwise([x], self.get_parameter(f"{name}.weight"), self.get_parameter(f"{name}.bias"))
