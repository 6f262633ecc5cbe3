"""oneDNN's operations, called as they are: where they can be, and its product of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from models.layout import is_channels_last

LEAST = 4096
"""Voxels: a volume that has no more is in the cache anyway, and would take more calls so."""
LEAST_NUMBERS = 2**15
"""The same for the input of a linear layer."""


def fit(*inputs: Tensor) -> bool:
    """Whether oneDNN's operations can be called for all of these: on a CPU, in single precision, not small; volumes
    (B, c, D, H, W) channels last."""
    # Graph formats have no such operations.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]  # torch's stub lacks it
        return False
    if torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.is_available():
        return False
    return all(_fits(x) for x in inputs)


def _fits(x: Tensor) -> bool:
    large = x[0, 0].numel() > LEAST and is_channels_last(x) if x.ndim == 5 else x.numel() > LEAST_NUMBERS
    return large and x.device.type == "cpu" and x.dtype == torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., cin) times weight (cout, cin), plus bias (cout,): (..., cout).

    As a 1x1 convolution, which oneDNN makes at the full vector width whatever processor it is; torch's product of
    matrices does not on AMD's. Without gradients.
    """
    image = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    y: Tensor = torch.ops.aten.mkldnn_convolution(image, weight[:, :, None, None], bias, [0, 0], [1, 1], [1, 1], 1)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (n, cin) times weight (cout, cin): (n, cout), by `linear` where it can be and pays. Without gradients."""
    return linear(x, weight, None) if fit(x) else torch.matmul(x, weight.T)
