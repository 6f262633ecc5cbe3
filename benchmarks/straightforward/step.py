"""One training step's loss and one inference window."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .blocks import Features, Output
from .losses import deep_supervision, one_hot, pixel_wise, relative_preference, semantic_wise, supervised

KL_WEIGHT = 0.5
PROTO_WEIGHT = 0.1


class Network(Protocol):
    """What the networks of this package offer."""

    def encode(self, x: Tensor, masks: Tensor) -> Features:
        """x (B, K, D, H, W), masks (B, K) bool -> features of all modalities."""

    def fuse(self, features: Features, masks: Tensor) -> Output:
        """The fused path of the modalities in masks (B, K) bool."""

    def separate(self, features: Features, k: int) -> Tensor:
        """Logits (B, C, D, H, W) of modality k alone."""


def total_loss(
    network: Network, x: Tensor, labels: Tensor, masks: Tensor, beta: Tensor, modal_weight: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The PASSION objective of a batch, a scalar, and its terms: fuse, prm (B,); sep, kl, proto, dist (B, K).

    x (B, K, D, H, W), class indices labels (B, D, H, W) int64, masks (B, K) bool, beta (K,), modal_weight (K,).
    """
    features = network.encode(x, masks)
    teacher = network.fuse(features, masks)
    y = one_hot(labels, teacher.logits.shape[1])
    per_modality: dict[str, list[Tensor]] = {"sep": [], "kl": [], "proto": [], "dist": []}
    for k in range(masks.shape[1]):
        present = masks[:, k].float()
        alone = torch.zeros_like(masks)
        alone[:, k] = True
        student = own_teacher(network.fuse(features, alone), teacher, masks)
        proto, dist = semantic_wise(student.feature, teacher.feature, y)
        per_modality["sep"].append(present * supervised(network.separate(features, k).softmax(1), y))
        per_modality["kl"].append(present * pixel_wise(student, teacher))
        per_modality["proto"].append(present * proto)
        per_modality["dist"].append(present * dist)
    terms = {name: torch.stack(columns, dim=1) for name, columns in per_modality.items()}
    terms["fuse"] = supervised(teacher.logits.softmax(1), y)
    terms["prm"] = deep_supervision(teacher, y)

    lag = (relative_preference(terms["dist"], masks) > 0).float()
    weighted = (
        lag * beta * modal_weight * terms["sep"]
        + KL_WEIGHT * beta * modal_weight * terms["kl"]
        + PROTO_WEIGHT * lag * modal_weight * terms["proto"]
    )
    return terms["fuse"].sum() + terms["prm"].sum() + weighted.sum(), terms


def own_teacher(student: Output, teacher: Output, masks: Tensor) -> Output:
    """The student, replaced by the teacher in samples with one modality, whatever dropout drew for either."""
    single = masks.sum(1) == 1
    if not single.any():
        return student

    def choose(of_student: Tensor, of_teacher: Tensor) -> Tensor:
        return torch.where(single[:, None, None, None, None], of_teacher, of_student)

    return Output(
        choose(student.logits, teacher.logits),
        choose(student.feature, teacher.feature),
        [choose(s, t) for s, t in zip(student.deep, teacher.deep, strict=True)],
    )


@torch.no_grad()
def segment_window(network: Network, x: Tensor, mask: Tensor) -> Tensor:
    """Class probabilities (B, C, D, H, W) of a window x (B, K, D, H, W) with the modalities in mask (B, K) bool."""
    return network.fuse(network.encode(x, mask), mask).logits.softmax(1)
