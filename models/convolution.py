"""Convolutions that keep their input alone for the backward pass: no padded copy, no concatenation.

They take the concatenation of several volumes without its being made: `parts`, side by side along channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models import folding, onednn, slabs, triton_kernels
from models.layout import is_channels_last, like, rows, volume
from models.precision import as_wanted, exact

BEYOND = (1,) * 6
Border = Literal["reflect", "zero"]
"""What lies beyond the faces of a volume."""
TORCHS_OWN = 20480
"""Channels times depth times height of one sample, up to which torch leaves oneDNN for its own convolution
(`ConvParams::use_mkldnn` of torch 2)."""


def convolve(
    parts: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    stride: int = 1,
    border: Border = "reflect",
    prepare: Callable[[Tensor], Tensor] | None = None,
    centred: bool = False,
) -> Tensor:
    """3x3x3 convolution of the concatenation of `parts`, each (B, c_i, D, H, W), padded by one voxel on every side.

    Gives (B, cout, D/stride, H/stride, W/stride). With `prepare`, a function without weights, it convolves what that
    makes of each part; the backward pass keeps the part and prepares it again, which pays for upsampling. `centred`: a
    norm follows, which takes each channel's mean away, and the bias with it; the bias then gets no gradient, which
    would be 0.
    """
    if weight.shape[1] > 1 or torch.is_grad_enabled():
        weight, bias, *parts = as_wanted(weight, bias, *parts)
    # else a scan itself, for whose grey values bfloat16 is too coarse: half of what it changed in masks came from there
    bias = bias.detach() if centred else bias
    if prepare and torch.compiler.is_compiling():  # graphs decide themselves what they make again
        parts, prepare = [prepare(part) for part in parts], None
    if torch.is_grad_enabled() and (weight.requires_grad or any(p.requires_grad for p in parts)):
        y: Tensor = _Convolve.apply(weight, bias, stride, border, prepare, *parts)
        return y
    with exact(weight.device):
        parts = [prepare(p) for p in parts] if prepare else parts
    if slabs.suit(*parts):
        made = slabs.convolve(parts, weight, bias, stride, border == "reflect")
        return slabs.joined(made, convolved_shape(parts[0], weight, stride))
    with exact(weight.device):
        return _convolve(_padded(parts, border), weight, bias, stride)


def convolved_shape(x: Tensor, weight: Tensor, stride: int) -> tuple[int, ...]:
    """Of what a convolution of x gives: (B, cout, D/stride, H/stride, W/stride)."""
    return len(x), len(weight), *(-(-s // stride) for s in x.shape[2:])


def pointwise(parts: Sequence[Tensor], weight: Tensor, bias: Tensor, centred: bool = False) -> Tensor:
    """1x1x1 convolution of the concatenation of `parts`, each (B, c_i, D, H, W), as matrix products.

    weight (cout, sum of c_i, 1, 1, 1); gives (B, cout, D, H, W). `centred` as in `convolve`.
    """
    first = parts[0]
    if slabs.suit(*parts):
        return slabs.joined(slabs.pointwise(parts, weight, bias), convolved_shape(first, weight, 1))
    if onednn.fit(*parts):
        y: Tensor = _Pointwise.apply(weight, bias.detach() if centred else bias, *parts)
        return y
    weight, bias, *parts = as_wanted(weight, bias, *parts)
    bias = bias.detach() if centred else bias
    columns = weight.flatten(1).split([p.shape[1] for p in parts], dim=1)
    if is_channels_last(first):
        by_voxel = bias
        for part, column in zip(parts, columns, strict=True):
            by_voxel = torch.addmm(by_voxel, rows(part).flatten(0, 1), column.T)
        return volume(by_voxel.unflatten(0, (len(first), -1)), first.shape[2:])
    by_channel = bias[None, :, None]
    for part, column in zip(parts, columns, strict=True):
        by_channel = torch.baddbmm(by_channel, column.expand(len(part), -1, -1), part.flatten(2))
    return by_channel.view(len(first), -1, *first.shape[2:])


class _Pointwise(torch.autograd.Function):
    """By oneDNN, several times as fast on a CPU as torch's product of a long matrix and a tiny one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *parts)
        return slabs.joined(slabs.pointwise(parts, weight, bias), convolved_shape(parts[0], weight, 1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weight, *parts = ctx.saved_tensors
        g = rows(like(gradient, parts[0])).flatten(0, 1)
        of_columns, of_parts = [], []
        for i, (part, column) in enumerate(
            zip(parts, weight.flatten(1).split([p.shape[1] for p in parts], dim=1), strict=True)
        ):
            of_columns.append(g.T @ rows(part).flatten(0, 1))
            of_part = None
            if ctx.needs_input_grad[2 + i]:
                by_voxel = onednn.linear(g, column.T, None)
                of_part = volume(by_voxel.unflatten(0, (len(part), -1)), part.shape[2:])
            of_parts.append(of_part)
        of_bias = g.sum(0) if ctx.needs_input_grad[1] else None
        return torch.cat(of_columns, dim=1).view_as(weight), of_bias, *of_parts


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor,
        stride: int,
        border: Border,
        prepare: Callable[[Tensor], Tensor] | None,
        *parts: Tensor,
    ) -> Tensor:
        ctx.stride, ctx.border, ctx.prepare = stride, border, prepare
        ctx.save_for_backward(weight, *parts)
        with exact(weight.device):
            prepared = [prepare(part) for part in parts] if prepare else parts
            ctx.fold = _fold(prepared, weight, stride)
            return _convolve(_padded(prepared, border, ctx.fold), weight, bias, stride, ctx.fold)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weight, *parts = ctx.saved_tensors
        needs_parts = any(ctx.needs_input_grad[5:])
        prepared = parts
        if ctx.prepare:
            parts = [part.detach().requires_grad_(needs_parts) for part in parts]
            with exact(weight.device), torch.set_grad_enabled(needs_parts):
                prepared = [ctx.prepare(part) for part in parts]
        with exact(weight.device), torch.no_grad():
            padded = _padded(prepared, ctx.border, ctx.fold)
            gradient = like(gradient, padded)
            wanted = [needs_parts, True, ctx.needs_input_grad[1]]
            of_padded, of_weight, of_bias = _convolve_backward(gradient, padded, weight, ctx.stride, wanted, ctx.fold)
            del padded
            of_parts: list[Any] = [None] * len(parts)
            if needs_parts:
                of_parts = list(_unpadded(of_padded, prepared, ctx.border))
            del of_padded
        if ctx.prepare and needs_parts:
            of_parts = list(torch.autograd.grad(prepared, parts, of_parts))
        return of_weight, of_bias, None, None, None, *of_parts


def _fold(parts: Sequence[Tensor], weight: Tensor, stride: int) -> int:
    """Voxels that are put side by side, see `models.folding`."""
    _, _, depth, height, width = parts[0].shape
    if not onednn.fit(*parts):
        return 1
    n = folding.fold(weight, stride, width)
    return n if n * weight.shape[1] * (depth + 2) * (height + 2) > TORCHS_OWN else 1


def _padded(parts: Sequence[Tensor], border: Border, fold: int = 1) -> Tensor:
    """The parts side by side along channels, with a voxel more beyond every face, and `folding.padding`."""
    if triton_kernels.suit(*parts):
        return triton_kernels.padded(parts, border == "reflect")
    if not is_channels_last(parts[0]):
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
        return F.pad(whole, BEYOND, mode="reflect" if border == "reflect" else "constant")
    # Channels last, torch's concatenation and its padding take several times as long as these copies.
    batch, _, *size = parts[0].shape
    *others, width = (s + 2 for s in size)
    shape = (batch, sum(p.shape[1] for p in parts), *others, size[-1] + folding.padding(fold))
    whole = torch.empty(shape, dtype=parts[0].dtype, device=parts[0].device, memory_format=torch.channels_last_3d)
    whole[..., width:] = 0
    padded, at = whole[..., :width], 0
    for part in parts:
        padded[:, at : at + part.shape[1], 1:-1, 1:-1, 1:-1] = part
        at += part.shape[1]
    for axis in (2, 3, 4):
        for face, inner in ((0, 2), (-1, -3)):
            if border == "reflect":
                padded.select(axis, face).copy_(padded.select(axis, inner))
            else:
                padded.select(axis, face).zero_()
    return whole


def _unpadded(gradient: Tensor, parts: Sequence[Tensor], border: Border) -> list[Tensor]:
    """The gradient of `_padded`, part by part; writes into `gradient`."""
    if border == "reflect" and triton_kernels.suit(gradient) and 3 not in parts[0].shape[2:]:
        inside = triton_kernels.unpadded(gradient)
        return [like(g, p) for g, p in zip(inside.split([p.shape[1] for p in parts], 1), parts, strict=True)]
    if border == "reflect":
        for axis in (4, 3, 2):
            for face, inner in ((0, 2), (-1, -3)):
                gradient.select(axis, inner).add_(gradient.select(axis, face))
    inside = gradient[:, :, 1:-1, 1:-1, 1:-1]
    return [like(g, p) for g, p in zip(inside.split([p.shape[1] for p in parts], 1), parts, strict=True)]


class _Halves:
    """One small volume as a batch of two halves, which gives the same sums.

    For one small sample torch leaves oneDNN for its own convolution, 5 to 15 times slower. For two samples it does not.
    """

    def __init__(self, depth: int, stride: int) -> None:
        """`depth`: of the output."""
        self.rows = -(-depth // 2)
        self.twice = 2 * self.rows - depth  # rows of the output that both halves have: 1 if its depth is odd
        self.first = slice(0, (self.rows - 1) * stride + 3)
        begin = (depth - self.rows) * stride
        self.second = slice(begin, begin + self.first.stop)

    @classmethod
    def needed(cls, padded: Tensor, stride: int) -> _Halves | None:
        batch, channels, depth, height, _ = padded.shape
        if padded.device.type != "cpu" or batch > 1 or channels == 1 or channels * depth * height > TORCHS_OWN:
            return None
        return cls((depth - 3) // stride + 1, stride)

    def of_input(self, padded: Tensor) -> Tensor:
        return torch.cat([padded[:, :, self.first], padded[:, :, self.second]])

    def of_gradient(self, gradient: Tensor) -> Tensor:
        second = gradient[:, :, gradient.shape[2] - self.rows :]
        if self.twice:
            second = second.clone()
            second[:, :, : self.twice] = 0  # the first half has it
        return torch.cat([gradient[:, :, : self.rows], second])

    def joined(self, halves: Tensor) -> Tensor:
        return torch.cat([halves[:1], halves[1:, :, self.twice :]], dim=2)

    def joined_gradient(self, halves: Tensor, like: Tensor) -> Tensor:
        whole = torch.zeros_like(like)
        whole[:, :, self.first] += halves[:1]
        whole[:, :, self.second] += halves[1:]
        return whole


def _convolve(padded: Tensor, weight: Tensor, bias: Tensor, stride: int, fold: int = 1) -> Tensor:
    if fold > 1:
        x = folding.side_by_side(padded, fold)
        return folding.apart(F.conv3d(x, folding.folded(weight, fold), bias.repeat(fold)), fold)
    halves = _Halves.needed(padded, stride)
    if halves is None:
        y = F.conv3d(padded, weight, bias, stride)
    else:
        y = halves.joined(F.conv3d(halves.of_input(padded), weight, bias, stride))
    return like(y, padded)  # torch forgets the layout where there is one channel


def _convolve_backward(
    gradient: Tensor, padded: Tensor, weight: Tensor, stride: int, wanted: list[bool], fold: int
) -> Any:
    """As `_backward`, of the padded input."""
    of_input, *of_others = wanted
    if fold > 1:
        x, g = (folding.side_by_side(t, fold) for t in (padded, gradient))
        at_once = of_input and padded.shape[-1] == gradient.shape[-1] + 2
        of_x, of_folded, of_bias = _backward(g, x, folding.folded(weight, fold), 1, [at_once, *of_others])
        if at_once:
            of_x = folding.apart(of_x, fold)
        elif of_input:
            of_x, *_ = _backward(gradient, padded[..., : gradient.shape[-1] + 2], weight, 1, [True, False, False])
        return of_x, folding.unfolded(of_folded, fold), None if of_bias is None else of_bias.view(fold, -1).sum(0)
    halves = _Halves.needed(padded, stride)
    x = padded if halves is None else halves.of_input(padded)
    g = gradient if halves is None else halves.of_gradient(gradient)
    of_x, of_weight, of_bias = _backward(g, x, weight, stride, wanted)
    if halves is not None and of_input:
        of_x = halves.joined_gradient(of_x, padded)
    return of_x, of_weight, of_bias


def _backward(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, wanted: list[bool]) -> Any:
    """Of the input, the weight and the bias, those that are wanted."""
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, [len(weight)], [stride] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1, wanted
    )
