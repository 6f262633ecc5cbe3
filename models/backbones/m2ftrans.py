"""M2FTrans: modality-masked fusion transformer for incomplete modalities (Shi et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Features, Fused, Mask
from models.blocks import (
    ConvNormAct,
    Encoder,
    MaskedPointwise,
    SeparateDecoder,
    encode_present,
    initialise,
    logits,
    separate_each,
    upsample,
)
from models.convolution import pointwise
from models.precision import exact, single
from models.recompute import recomputed
from models.task import Task
from models.transformer import MLP, Linear, PreNorm, Residual, attention_weights

LEVELS = 5
SCALE = 2 ** (LEVELS - 1)
"""Voxels of a patch per token, along each axis."""
DEPTH = 3
HEADS = 8
HIDDEN = 4096
REFINED_LEVELS = 2
"""The deepest levels, where the modalities refine the fused feature; above, a convolution fuses them."""
REFINEMENTS = 2
DROPOUT = 0.1
CHANNEL_NORM_EPS = 1e-6


class MaskedAttention(nn.Module):
    """Attention in which a modality's tokens see their own modality alone and the fusion tokens see all tokens.

    What no token may see is not computed: the modalities attend side by side, each to itself, and only the fusion
    tokens' rows of the attention matrix span the sequence.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = Linear(width, 3 * width, bias=False)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, P + 1, T, D), the P present modalities, then the fusion tokens.

        Gives the same shape, and what the fusion tokens weighed every token with: (B, heads, T, (P + 1) * T).
        """
        rate = self.dropout if self.training else 0.0
        q, k, v = self.qkv(x).unflatten(3, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)  # (B, P + 1, heads, T, d)
        own = F.scaled_dot_product_attention(
            q[:, :-1].flatten(0, 1), k[:, :-1].flatten(0, 1), v[:, :-1].flatten(0, 1), dropout_p=rate
        )
        of_all_k, of_all_v = (part.transpose(1, 2).flatten(2, 3) for part in (k, v))
        weights = F.dropout(attention_weights(q[:, -1], of_all_k), self.dropout, self.training)
        fusion = torch.matmul(weights, of_all_v)
        seen = torch.cat([own.unflatten(0, (len(x), -1)), fusion[:, None]], dim=1)
        return F.dropout(self.proj(seen.transpose(2, 3).flatten(3)), self.dropout, self.training), weights


class AttentionLayer(nn.Module):
    """x + attention(LayerNorm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fn = PreNorm(width, MaskedAttention(width, HEADS, DROPOUT))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `MaskedAttention`."""
        seen, weights = self.fn.fn(self.fn.norm(x))
        return x + seen, weights


class MaskedTransformer(nn.Module):
    """The layers of the bottleneck."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cross_attention_list = nn.ModuleList([AttentionLayer(width) for _ in range(DEPTH)])
        self.cross_ffn_list = nn.ModuleList(
            [Residual(PreNorm(width, MLP(width, HIDDEN, DROPOUT))) for _ in range(DEPTH)]
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P + 1, T, D) -> the same, and the fusion tokens' weights of the first layer."""
        of_layers = []
        for attention, mlp in zip(self.cross_attention_list, self.cross_ffn_list, strict=True):
            x, weights = recomputed(attention, x)
            x = recomputed(mlp, x)
            of_layers.append(weights)
        return x, of_layers[0]


class Bottleneck(nn.Module):
    """Exchanges what the modalities hold at the deepest level with the fusion tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trans_bottle = MaskedTransformer(width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P + 1, T, D) -> the same, and the gate (B, P, T): how much the fusion tokens saw of every token.

        The gate only says where to look: the released training lets no gradient through it.
        """
        x, weights = self.trans_bottle(x)
        gate = weights.detach().sum((1, 2)).unflatten(1, x.shape[1:3])
        return x, gate[:, :-1]


def channel_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm over the channels of (B, c, ...)."""
    y = F.layer_norm(x.movedim(1, -1), norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return y.movedim(-1, 1)


def pointwise_norm(x: Tensor, conv: nn.Conv3d, norm: nn.LayerNorm) -> Tensor:
    """1x1x1 convolution, then `channel_norm`."""
    assert conv.bias is not None
    return channel_norm(pointwise([x], conv.weight, conv.bias), norm)


def by_group(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A convolution with groups, in single precision whatever the others are in.

    It would gain little in bfloat16, and on a CPU oneDNN's gradients of its weights are at times memory that nobody
    wrote.
    """
    with exact(x.device):
        y: Tensor = _as_products(conv, single(x)) if x.is_cuda else conv(single(x))
    return y


def _as_products(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A zero-padded 3x3x3 convolution with groups as one product of matrices a group. cuDNN starts programs of their
    own for each group, one after the other."""
    assert conv.bias is not None
    patches = F.pad(x, (1,) * 6).unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)  # (B, c, d, h, w, 3, 3, 3)
    columns = patches.unflatten(1, (conv.groups, -1)).permute(0, 1, 2, 6, 7, 8, 3, 4, 5).flatten(6).flatten(2, 5)
    weight = conv.weight.unflatten(0, (conv.groups, -1)).flatten(2)
    products = torch.matmul(weight, columns).flatten(1, 2)
    y: Tensor = products.unflatten(2, x.shape[2:]) + conv.bias[:, None, None, None]
    return y


class Projection(nn.Module):
    """Depthwise-separable convolution, zero-padded."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(width, width, 1)
        self.norm1 = nn.LayerNorm(width, CHANNEL_NORM_EPS)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1, groups=width)
        self.norm2 = nn.LayerNorm(width, CHANNEL_NORM_EPS)
        self.conv3 = nn.Conv3d(width, width, 1)
        self.norm3 = nn.LayerNorm(width, CHANNEL_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, d, h, w) -> the same."""
        x = F.gelu(pointwise_norm(x, self.conv1, self.norm1))
        x = F.gelu(channel_norm(by_group(self.conv2, x), self.norm2))
        return pointwise_norm(x, self.conv3, self.norm3)


class FeedForward(nn.Module):
    """1x1x1 convolution to four times the channels, a zero-padded one in `width` groups, 1x1x1 back, plus identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pwconv1 = nn.Conv3d(width, 4 * width, 1)
        self.norm1 = nn.LayerNorm(4 * width, CHANNEL_NORM_EPS)
        self.dwconv = nn.Conv3d(4 * width, 4 * width, 3, padding=1, groups=width)
        self.norm2 = nn.LayerNorm(4 * width, CHANNEL_NORM_EPS)
        self.pwconv2 = nn.Conv3d(4 * width, width, 1)
        self.norm3 = nn.LayerNorm(width, CHANNEL_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, d, h, w) -> the same."""
        y = F.gelu(pointwise_norm(x, self.pwconv1, self.norm1))
        y = F.gelu(channel_norm(by_group(self.dwconv, y), self.norm2))
        return F.gelu(x + pointwise_norm(y, self.pwconv2, self.norm3))


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

    def forward(self, query: Tensor, present: Tensor, mask: Mask) -> Tensor:
        """query (B, c, d, h, w), present (B, P, c, d, h, w) -> what is added to the query."""
        there = [name for name, is_there in zip(self.names, mask, strict=True) if is_there]
        keys, values = (
            torch.cat([self.get_submodule(f"{kind}_map_{name}")(present[:, p]) for p, name in enumerate(there)], dim=1)
            for kind in ("key", "value")
        )
        weights = attention_weights(self.query_map(query).flatten(2), keys.flatten(2))  # (B, c, P * c)
        seen = torch.matmul(weights, values.flatten(2)).view(query.shape)
        return F.dropout(self.out_project(seen), DROPOUT, self.training)


class RefinementLayer(nn.Module):
    """Refines the fused feature, then, unless it is the last layer, the modalities'."""

    def __init__(self, names: Sequence[str], width: int, last: bool) -> None:
        super().__init__()
        self.cross_attn = ChannelAttention(names, width)
        self.ffn1 = FeedForward(width)
        self.ffn2 = None if last else FeedForward(width)

    def forward(self, query: Tensor, present: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """query (B, c, d, h, w), present (B, P, c, d, h, w) -> both, refined."""
        query = self.ffn1(query + self.cross_attn(query, present, mask))
        if self.ffn2 is not None:
            present = self.ffn2(present.flatten(0, 1)).view(present.shape)
        return query, present


class Refinement(nn.Module):
    """The fused feature of a deep level, refined against the modalities'."""

    def __init__(self, names: Sequence[str], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([RefinementLayer(names, width, n == REFINEMENTS - 1) for n in range(REFINEMENTS)])

    def forward(self, query: Tensor, present: Sequence[Tensor], mask: Mask) -> Tensor:
        """query (B, c, d, h, w), present: P times the same -> (B, c, d, h, w)."""
        together = torch.stack(list(present), dim=1)
        for layer in self.layers:
            query, together = recomputed(layer, query, together, mask)
        return query


class ModalityFusion(nn.Module):
    """One feature of all present modalities."""

    def __init__(self, modalities: int, width: int) -> None:
        super().__init__()
        self.fusion_layer = nn.ModuleList(
            [
                MaskedPointwise(modalities, width, width),
                ConvNormAct(width, width),
                ConvNormAct(width, width, kernel=1),
            ]
        )

    def forward(self, present: Sequence[Tensor], mask: Mask) -> Tensor:
        """present: P times (B, c, d, h, w) -> (B, c, d, h, w)."""
        x: Tensor = self.fusion_layer[0](present, mask)
        for layer in self.fusion_layer[1:]:
            x = layer(x)
        return x


class LogitHead(nn.Module):
    """Class logits of one level."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.prm_layer = nn.Sequential(ConvNormAct(width, 16, kernel=1), nn.Conv3d(16, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, d, h, w) -> (B, C, d, h, w)."""
        hidden, last = self.prm_layer
        return logits(last, hidden(x))


class FusedDecoder(nn.Module):
    """Decoder of any subset of modalities, deepest level first."""

    def __init__(self, names: Sequence[str], widths: Sequence[int], classes: int) -> None:
        super().__init__()
        for level in range(LEVELS, 0, -1):
            width = widths[level - 1]
            if level < LEVELS:
                self.add_module(f"d{level}_c1", ConvNormAct(widths[level], width))
            self.add_module(f"d{level}_c2", ConvNormAct(2 * width, width))
            self.add_module(f"d{level}_out", ConvNormAct(width, width, kernel=1))
            self.add_module(f"prm_fusion{level}", LogitHead(width, classes))
            if level > LEVELS - REFINED_LEVELS:
                self.add_module(f"CT{level}", Refinement(names, width))
            else:
                self.add_module(f"RFM{level}", ModalityFusion(len(names), width))
        self.seg_layer = nn.Conv3d(widths[0], classes, 1)

    def forward(self, gated: Sequence[Sequence[Tensor]], fusion: Tensor, mask: Mask) -> Fused:
        """gated: per level P times (B, c, d, h, w), finest first; fusion: the fusion tokens' volume at the deepest."""
        x = fusion
        deep: list[Tensor] = []
        for level in range(LEVELS, 0, -1):
            u = x if level == LEVELS else self.get_submodule(f"d{level}_c1")(x, prepare=upsample)
            deep.insert(0, self.get_submodule(f"prm_fusion{level}")(u))
            if level > LEVELS - REFINED_LEVELS:
                fused = self.get_submodule(f"CT{level}")(u, gated[level - 1], mask)
            else:
                fused = self.get_submodule(f"RFM{level}")(gated[level - 1], mask)
            x = self.get_submodule(f"d{level}_c2")(fused, u)
            x = self.get_submodule(f"d{level}_out")(x)
        return Fused(logits=logits(self.seg_layer, x), feature=x, deep=deep)


def chosen(level: Sequence[Tensor | None], mask: Mask) -> list[Tensor]:
    """The features of the P modalities in `mask`, each (B, c, d, h, w). Raises ValueError for one not encoded."""
    present: list[Tensor] = []
    for k, feature in enumerate(level):
        if mask[k]:
            if feature is None:
                raise ValueError(f"modality {k} is in the mask of the fused path but was not encoded")
            present.append(feature)
    return present


class M2FTrans(nn.Module):
    """M2FTrans for any modalities and classes. Its learned positions tie it to the task's patch size."""

    def __init__(self, task: Task, width: int = 8) -> None:
        super().__init__()
        self.modalities = task.names
        self.patch_size = task.patch_size
        classes = len(task.labels)
        widths = [width * 2**level for level in range(LEVELS)]
        tokens = prod(p // SCALE for p in task.patch_size)
        self.pos = nn.Parameter(torch.zeros(1, (len(self.modalities) + 1) * tokens, widths[-1]))
        self.fusion = nn.Parameter(torch.randn(1, tokens, widths[-1]))
        for name in self.modalities:
            self.add_module(f"{name}_encoder", Encoder(widths))
        self.Bottleneck = Bottleneck(widths[-1])
        self.decoder_fusion = FusedDecoder(self.modalities, widths, classes)
        self.decoder_sep = SeparateDecoder(widths, classes)
        initialise(self)

    def encode(self, x: Tensor, mask: Mask) -> Features:
        """See `Backbone.encode`. Raises ValueError for a size that is not the patch's."""
        size = tuple(x.shape[2:])
        if size != self.patch_size:
            raise ValueError(f"M2FTrans's positions are made for patches of {self.patch_size}: it cannot take {size}")
        return encode_present([self.get_submodule(f"{name}_encoder") for name in self.modalities], x, mask)

    def fuse(self, features: Features, mask: Mask) -> Fused:
        """See `Backbone.fuse`. Raises ValueError if the mask has a modality that was not encoded."""
        present = [chosen(level, mask) for level in features]
        volumes, gate = self._exchange(torch.stack(present[-1], dim=1), mask)
        present[-1] = list(volumes[:, :-1].unbind(1))
        gated = [
            [f * g for f, g in zip(level, F.interpolate(gate, size=level[0].shape[2:]).split(1, dim=1), strict=True)]
            for level in present
        ]
        fused: Fused = self.decoder_fusion(gated, volumes[:, -1], mask)
        return fused

    def _exchange(self, deepest: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """deepest (B, P, c, d, h, w) -> the transformed tokens as volumes (B, P + 1, c, d, h, w), the fusion tokens'
        last, and the gate (B, P, d, h, w).
        """
        shape = deepest.shape[3:]
        fusion = self.fusion[:, None].expand(len(deepest), -1, -1, -1)
        tokens = torch.cat([deepest.flatten(3).transpose(2, 3), fusion], dim=1)
        of_each = self.pos.unflatten(1, (len(mask) + 1, -1)).unbind(1)
        positions = torch.stack([p for p, there in zip(of_each, (*mask, True), strict=True) if there], dim=1)
        x, gate = self.Bottleneck(tokens + positions)
        return x.transpose(2, 3).unflatten(3, shape), gate.unflatten(2, shape)

    def separate(self, features: Features) -> list[Tensor | None]:
        """See `Backbone.separate`."""
        return separate_each(self.decoder_sep, features)
