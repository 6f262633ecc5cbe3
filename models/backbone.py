"""What a backbone offers: `encode`, `fuse`, `separate`. Training and serving know no more of a network than this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor

Mask: TypeAlias = Sequence[bool]
"""Presence of the K modalities. One mask holds for every sample of a call: a batch that mixes masks is split by its
caller, so a missing modality costs nothing and no shape depends on data."""

Features: TypeAlias = list[list[Tensor | None]]
"""Encoder features, `features[level][k]` of shape (B, c_level, D, H, W), finest level first; None where missing."""


@dataclass(frozen=True)
class Fused:
    """What the fused decoder gives for one mask."""

    logits: Tensor
    """(B, C, D, H, W)"""
    feature: Tensor
    """(B, width, D, H, W): the decoder feature before the output head."""
    deep: list[Tensor]
    """Logits of the deep supervision heads at their own resolution, finest first, each (B, C, d, h, w)."""


@runtime_checkable
class Backbone(Protocol):
    """A network for K modalities and C classes."""

    def encode(self, x: Tensor, mask: Mask) -> Features:
        """Features of the present modalities of x (B, K, D, H, W); channels of missing ones are not read."""

    def fuse(self, features: Features, mask: Mask) -> Fused:
        """The fused decoder on the features of the modalities in `mask`, which must be among those encoded."""

    def separate(self, features: Features) -> list[Tensor | None]:
        """Logits (B, C, D, H, W) of the shared separate decoder for each encoded modality alone (training only)."""
