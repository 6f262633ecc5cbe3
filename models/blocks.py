"""Convolution blocks that the backbones share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Features, Mask

SLOPE = 0.2
EPS = 1e-5


def norm_act(x: Tensor) -> Tensor:
    """InstanceNorm without affine, then LeakyReLU(0.2)."""
    return F.leaky_relu(F.instance_norm(x, eps=EPS), SLOPE, inplace=True)


def upsample(x: Tensor, factor: int = 2) -> Tensor:
    """Trilinear, align_corners=True."""
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=factor, mode="trilinear", align_corners=True)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1x1x1 convolution as one matrix product: (B, cin, ...) with weight (cout, cin, 1, 1, 1) -> (B, cout, ...)."""
    batch = x.shape[0]
    matrix = weight.flatten(1).expand(batch, -1, -1)
    product = torch.baddbmm(bias[None, :, None], matrix, x.flatten(2))
    return product.view(batch, -1, *x.shape[2:])


def convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """3x3x3 convolution with reflection padding: (B, cin, D, H, W) -> (B, cout, D/stride, H/stride, W/stride)."""
    x = F.pad(x, (1,) * 6, mode="reflect")
    depth = (x.shape[2] - 3) // stride + 1
    if not _torch_would_be_slow(x) or depth % 2:
        return F.conv3d(x, weight, bias, stride)
    # Two half volumes as a batch of two give the same sums.
    rows, second = (depth // 2 - 1) * stride + 3, depth // 2 * stride
    halves = torch.cat([x[:, :, :rows], x[:, :, second : second + rows]])
    return torch.cat(F.conv3d(halves, weight, bias, stride).split(1), dim=2)


def _torch_would_be_slow(x: Tensor) -> bool:
    """Whether torch leaves oneDNN for its own convolution, 5 to 15 times slower, as it does for one small volume.

    The rule is in `ConvParams::use_mkldnn` of torch 2: one sample and at most 20480 values in its first planes.
    """
    batch, channels, depth, height, _ = x.shape
    return x.device.type == "cpu" and batch == 1 and 1 < channels <= 20480 // (depth * height)


class ConvNormAct(nn.Module):
    """Convolution, InstanceNorm, LeakyReLU(0.2)."""

    def __init__(self, cin: int, cout: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(cin, cout, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, cin, D, H, W) -> (B, cout, D/stride, H/stride, W/stride)."""
        weight, bias = self.conv.weight, self.conv.bias
        assert bias is not None
        if weight.shape[-1] == 1:
            return norm_act(pointwise(x, weight, bias))
        return norm_act(convolve(x, weight, bias, self.conv.stride[0]))


class MaskedPointwise(nn.Module):
    """1x1x1 convolution over K concatenated features (then norm, act) of which only the present ones are given.

    A missing modality's feature is zero, so its columns of the weight add nothing and are left out.
    """

    def __init__(self, modalities: int, cin: int, cout: int) -> None:
        super().__init__()
        self.modalities = modalities
        self.conv = nn.Conv3d(modalities * cin, cout, 1)

    def forward(self, present: Tensor, mask: Mask) -> Tensor:
        """(B, P * cin, ...) of the P modalities present in `mask`, in order -> (B, cout, ...)."""
        weight = self.conv.weight
        if not all(mask):
            columns = weight.unflatten(1, (self.modalities, -1))
            weight = torch.cat([columns[:, k] for k, there in enumerate(mask) if there], dim=1)
        assert self.conv.bias is not None
        return norm_act(pointwise(present, weight, self.conv.bias))


class Encoder(nn.Module):
    """Convolutional encoder of one modality: per level c1 (stride 2 from level 2 on), then x + c3(c2(x))."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.levels = len(widths)
        cin = 1
        for level, width in enumerate(widths, 1):
            self.add_module(f"e{level}_c1", ConvNormAct(cin, width, stride=1 if level == 1 else 2))
            self.add_module(f"e{level}_c2", ConvNormAct(width, width))
            self.add_module(f"e{level}_c3", ConvNormAct(width, width))
            cin = width

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 1, D, H, W) -> one feature a level, finest first."""
        features = []
        for level in range(1, self.levels + 1):
            x = self.get_submodule(f"e{level}_c1")(x)
            x = x + self.get_submodule(f"e{level}_c3")(self.get_submodule(f"e{level}_c2")(x))
            features.append(x)
        return features


class SeparateDecoder(nn.Module):
    """U-Net decoder of one modality alone, with weights that all modalities share. Used in training only."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.levels = len(widths)
        for level in range(self.levels - 1, 0, -1):
            width = widths[level - 1]
            self.add_module(f"d{level}_c1", ConvNormAct(widths[level], width))
            self.add_module(f"d{level}_c2", ConvNormAct(2 * width, width))
            self.add_module(f"d{level}_out", ConvNormAct(width, width, kernel=1))
        self.seg_layer = nn.Conv3d(widths[0], classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Raw encoder features, finest first -> logits (B, C, D, H, W)."""
        x = features[-1]
        for level in range(self.levels - 1, 0, -1):
            u = self.get_submodule(f"d{level}_c1")(upsample(x))
            x = self.get_submodule(f"d{level}_c2")(torch.cat([u, features[level - 1]], dim=1))
            x = self.get_submodule(f"d{level}_out")(x)
        logits: Tensor = self.seg_layer(x)
        return logits


def encode_present(encoders: Sequence[nn.Module], x: Tensor, mask: Mask) -> Features:
    """Features of the modalities in `mask`, each channel of x (B, K, D, H, W) through its own encoder."""
    of_modality = [encoder(x[:, k : k + 1]) if mask[k] else None for k, encoder in enumerate(encoders)]
    levels = max(len(own) for own in of_modality if own is not None)
    return [[None if own is None else own[level] for own in of_modality] for level in range(levels)]


def separate_each(decoder: nn.Module, features: Features) -> list[Tensor | None]:
    """Logits that a separate decoder gives for each encoded modality alone, None for the others."""
    return [
        None if column[0] is None else decoder([f for f in column if f is not None])
        for column in zip(*features, strict=True)
    ]


def initialise(network: nn.Module) -> None:
    """Conv3d weights by `kaiming_normal_` with torch's defaults; everything else stays as torch makes it."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight)
