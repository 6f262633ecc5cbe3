"""Convolution blocks that the backbones share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import slabs
from models.backbone import Features, Mask
from models.convolution import Border, convolve, convolved_shape, pointwise
from models.layout import channel
from models.normalisation import norm_act
from models.precision import exact, single


def upsample(x: Tensor, factor: int = 2) -> Tensor:
    """Trilinear, align_corners=True."""
    if factor == 1:
        return x
    if x.is_cuda and not torch.compiler.is_compiling():
        return _upsampled_by_axis(x, factor)
    return F.interpolate(x, scale_factor=factor, mode="trilinear", align_corners=True)


def _upsampled_by_axis(x: Tensor, factor: int) -> Tensor:
    """As products with a matrix an axis. On a GPU torch's own gradient adds voxel by voxel to what it came from."""
    y = single(x)
    along_w, along_h, along_d = (_interpolation(s, factor, x.device) for s in reversed(x.shape[2:]))
    with exact(x.device):
        y = torch.matmul(y, along_w.T)
        y = torch.matmul(along_h, y)
        y = torch.matmul(along_d, y.flatten(3))
    found: Tensor = y.unflatten(3, (len(along_h), len(along_w))).to(x.dtype)
    return found


@cache
def _interpolation(size: int, factor: int, device: torch.device) -> Tensor:
    """(factor * size, size): the weights of linear interpolation, align_corners=True."""
    with torch.inference_mode(False):  # it is kept, and may next be wanted in training
        each = torch.eye(size, dtype=torch.float64)[None]
        along = F.interpolate(each, scale_factor=factor, mode="linear", align_corners=True)[0].T
        return along.float().to(device)


def present_columns(weight: Tensor, modalities: int, there: Sequence[int]) -> Tensor:
    """The columns of a weight (cout, K * c, 1, 1, 1) that meet the modalities `there`, by index, in order."""
    if len(there) == modalities:
        return weight
    columns = weight.chunk(modalities, dim=1)
    return torch.cat([columns[k] for k in there], dim=1)


class ConvNormAct(nn.Module):
    """Convolution, InstanceNorm, LeakyReLU(0.2)."""

    def __init__(self, cin: int, cout: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(cin, cout, kernel, stride)

    def forward(
        self, *parts: Tensor, prepare: Callable[[Tensor], Tensor] | None = None, plus: Tensor | None = None
    ) -> Tensor:
        """(B, cin, D, H, W), whole or in parts along the channels -> (B, cout, D/stride, H/stride, W/stride).

        `plus` is added at the end. `prepare` as in `convolve`; only a 3x3x3 convolution takes it.
        """
        weight, bias = self.conv.weight, self.conv.bias
        assert bias is not None
        return conv_norm_act(parts, weight, bias, self.conv.stride[0], prepare=prepare, then_plus=plus)


def conv_norm_act(
    parts: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    stride: int = 1,
    border: Border = "reflect",
    prepare: Callable[[Tensor], Tensor] | None = None,
    plus: Tensor | None = None,
    then_plus: Tensor | None = None,
) -> Tensor:
    """`norm_act` of a convolution, 3x3x3 as `convolve` or 1x1x1 as `pointwise`.

    Gives (B, cout, D/stride, H/stride, W/stride). `plus` is added before the norm, `then_plus` after the activation;
    both have that shape.
    """
    if prepare and not torch.is_grad_enabled():  # nothing is kept that could be prepared again
        parts, prepare = [prepare(part) for part in parts], None
    if slabs.suit(*parts, *(x for x in (plus, then_plus) if x is not None)):
        if weight.shape[-1] == 1:
            made = slabs.pointwise(parts, weight, bias)
        else:
            made = slabs.convolve(parts, weight, bias, stride, border == "reflect")
        made = made if plus is None else slabs.plus(made, plus)
        return slabs.norm_act(made, convolved_shape(parts[0], weight, stride), then_plus)
    kernel = weight.shape[-1]
    if kernel == 1:
        x = pointwise(parts, weight, bias, centred=True)
    else:
        x = convolve(parts, weight, bias, stride, border, prepare, centred=True)
    x = norm_act(x if plus is None else plus + x)
    return x if then_plus is None else then_plus + x


class MaskedPointwise(nn.Module):
    """1x1x1 convolution over K concatenated features (then norm, act) of which only the present ones are given.

    A missing modality's feature is zero, so its columns of the weight add nothing and are left out.
    """

    def __init__(self, modalities: int, cin: int, cout: int) -> None:
        super().__init__()
        self.modalities = modalities
        self.conv = nn.Conv3d(modalities * cin, cout, 1)

    def forward(self, present: Sequence[Tensor], mask: Mask) -> Tensor:
        """Features (B, cin, D, H, W) of the modalities present in `mask`, in order -> (B, cout, D, H, W)."""
        assert self.conv.bias is not None
        weight = present_columns(self.conv.weight, self.modalities, [k for k, there in enumerate(mask) if there])
        return conv_norm_act(present, weight, self.conv.bias)


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
            x = self.get_submodule(f"e{level}_c3")(self.get_submodule(f"e{level}_c2")(x), plus=x)
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
            u = self.get_submodule(f"d{level}_c1")(x, prepare=upsample)
            x = self.get_submodule(f"d{level}_c2")(u, features[level - 1])
            x = self.get_submodule(f"d{level}_out")(x)
        return logits(self.seg_layer, x)


def logits(layer: nn.Module, x: Tensor) -> Tensor:
    """A 1x1x1 `nn.Conv3d` that nothing follows: (B, c, D, H, W) -> (B, C, D, H, W)."""
    return pointwise([x], layer.get_parameter("weight"), layer.get_parameter("bias"))


def encode_present(encoders: Sequence[nn.Module], x: Tensor, mask: Mask) -> Features:
    """Features of the modalities in `mask`, each channel of x (B, K, D, H, W) through its own encoder."""
    of_modality = [encoder(channel(x, k)) if mask[k] else None for k, encoder in enumerate(encoders)]
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
