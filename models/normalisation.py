"""InstanceNorm with its activation, which keeps its output alone for the backward pass: the next layer's input."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models import slabs, triton_kernels
from models.layout import is_channels_last, like, rows, volume
from models.precision import exact, single

SLOPE = 0.2
EPS = 1e-5
SMALL = 4096
"""Voxels. A smaller map is copied channel by channel and left to torch, and its sums are torch's to the last digit."""


def norm_act(x: Tensor) -> Tensor:
    """InstanceNorm without affine, then LeakyReLU(0.2), of (B, c, D, H, W)."""
    if torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = _NormAct.apply(x)
        return y
    if slabs.suit(x):
        return slabs.norm_act(slabs.of_volume(x), x.shape)
    if not x.is_cuda and not is_channels_last(x):  # in operations that graph formats have
        return F.leaky_relu(F.instance_norm(x, eps=EPS), SLOPE, inplace=True)
    with exact(x.device):
        return _normalise(x)[0]


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with exact(x.device):
            y, inverse_deviation = _normalise(x)
        ctx.channels_last = is_channels_last(x)
        ctx.save_for_backward(y, inverse_deviation)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        y, inverse_deviation = ctx.saved_tensors
        if triton_kernels.suit(y):
            gradient = gradient if triton_kernels.suit(gradient) else gradient.contiguous()
            return triton_kernels.norm_act_backward(gradient, y, inverse_deviation, SLOPE, ctx.channels_last)
        matrix = _Matrix(y)
        flat_g, flat_y = matrix.of(single(gradient)), single(matrix.of(y))
        g: Tensor = torch.ops.aten.leaky_relu_backward(flat_g, flat_y, SLOPE, True)
        inverse = matrix.spread(inverse_deviation)
        shift = inverse * matrix.spread(-matrix.mean(g))
        # The gradient times y is g times the normalised map: the slope is a factor of the one or of the other.
        factor = inverse * matrix.spread(-matrix.mean(flat_g * flat_y))
        # LeakyReLU can be undone, so its input, the normalised map, need not be kept.
        normalised = F.leaky_relu(flat_y, 1 / SLOPE)
        torch.addcmul(shift, g, inverse, out=g).addcmul_(normalised, factor)
        return matrix.back(g).to(y.dtype)


def _normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """`norm_act`, and the inverse standard deviation (B, c)."""
    if triton_kernels.suit(x):
        return triton_kernels.norm_act(x, EPS, SLOPE)
    if x.is_cuda and not is_channels_last(x):  # a BatchNorm would give each of a handful of channels one processor
        flat = single(x.flatten(2))
        variance, mean = torch.var_mean(flat, 2, correction=0, keepdim=True)
        inverse_deviation = (variance + EPS).rsqrt()
        y = F.leaky_relu((flat - mean) * inverse_deviation, SLOPE).view(x.shape).to(x.dtype)
        return y, inverse_deviation[..., 0]
    if not is_channels_last(x) or x[0, 0].numel() <= SMALL:
        # InstanceNorm is BatchNorm of one sample with all channels
        flat = single(x.contiguous().view(1, -1, *x.shape[2:]))
        normalised, _, deviations = torch.native_batch_norm(flat, None, None, None, None, True, 0.0, EPS)
        y = F.leaky_relu(normalised, SLOPE, inplace=True).view(x.shape).to(x.dtype)
        return like(y, x), deviations.view(x.shape[:2])
    # Over channels last torch adds up one value after the other in single precision: 1e-4 off where this is 1e-6.
    matrix = _Matrix(x)
    flat = single(matrix.of(x))
    y = flat - matrix.spread(matrix.mean(flat))
    inverse_deviation = (matrix.mean(y.square()) + EPS).rsqrt()
    y.mul_(matrix.spread(inverse_deviation))
    return matrix.back(F.leaky_relu(y, SLOPE, inplace=True).to(x.dtype)), inverse_deviation


class _Matrix:
    """A volume (B, c, D, H, W) as (B, rows, columns), such that a value per channel is the same in every row or column.

    Channels last a row is some voxels with all their channels, as long as vector instructions want it; else a channel.
    """

    def __init__(self, like: Tensor) -> None:
        self.shape = like.shape
        self.last = is_channels_last(like)
        self.voxels = like[0, 0].numel()
        self.repeats = gcd(self.voxels, 64)

    def of(self, x: Tensor) -> Tensor:
        return rows(x).reshape(len(x), -1, self.repeats * x.shape[1]) if self.last else x.flatten(2)

    def back(self, matrix: Tensor) -> Tensor:
        batch, channels, *size = self.shape
        return volume(matrix.view(batch, -1, channels), size) if self.last else matrix.view(self.shape)

    def mean(self, matrix: Tensor) -> Tensor:
        """(B, c)"""
        if not self.last:
            return matrix.mean(2)
        return matrix.sum(1).view(self.shape[0], self.repeats, self.shape[1]).sum(1) / self.voxels

    def spread(self, values: Tensor) -> Tensor:
        """(B, c) -> what is broadcast with the matrix."""
        return values.repeat(1, self.repeats)[:, None] if self.last else values[:, :, None]
