"""Pre-norm transformer pieces that the backbones share.

Residual around attention and around the MLP, a LayerNorm (eps 1e-5) before each and none at the end, exact GELU.
Dropout falls on the attention weights, on both outputs and inside the MLP, in train mode only, and draws from torch's
global generator. Module names are those of the published checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import onednn

LARGE = 2**20
"""Weights of a linear layer, from which on its gradients are oneDNN's, too: mmFormer's. M2FTrans's gain little, and it
magnifies how they are rounded."""


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) of queries (..., Nq, d) and keys (..., Nk, d) -> (..., Nq, Nk)."""
    return torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5, -1)


class Linear(nn.Linear):
    """A linear layer that on a CPU is oneDNN's product of matrices: twice as fast as torch's."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., cin) -> (..., cout)."""
        if not onednn.fit(x):
            return super().forward(x)
        if not torch.is_grad_enabled():
            return onednn.linear(x, self.weight, self.bias)
        if self.weight.numel() < LARGE:
            return super().forward(x)
        y: Tensor = _Linear.apply(x, self.weight, self.bias)
        return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        g, flat = gradient.reshape(-1, len(weight)), x.reshape(-1, x.shape[-1])
        of_bias = g.sum(0) if ctx.needs_input_grad[2] else None
        return onednn.linear(gradient, weight.T, None), onednn.linear(g.T.contiguous(), flat.T, None), of_bias


class SelfAttention(nn.Module):
    """Multi-head self-attention, scale (D / heads)^-1/2; only the output projection has a bias."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = Linear(width, 3 * width, bias=False)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.proj(seen.transpose(1, 2).flatten(2)), self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), Linear(hidden, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        y: Tensor = self.net(x)
        return y


class PreNorm(nn.Module):
    """LayerNorm, then `fn`."""

    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        y: Tensor = self.fn(self.norm(x))
        return y


class Residual(nn.Module):
    """x + fn(x)."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        y: Tensor = x + self.fn(x)
        return y


class Transformer(nn.Module):
    """`depth` layers of self-attention and MLP in which every token sees every token."""

    def __init__(self, width: int, depth: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.cross_attention_list = nn.ModuleList(
            [Residual(PreNorm(width, SelfAttention(width, heads, dropout))) for _ in range(depth)]
        )
        self.cross_ffn_list = nn.ModuleList(
            [Residual(PreNorm(width, MLP(width, hidden, dropout))) for _ in range(depth)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        for attention, mlp in zip(self.cross_attention_list, self.cross_ffn_list, strict=True):
            x = mlp(attention(x))
        return x
