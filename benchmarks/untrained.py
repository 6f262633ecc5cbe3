"""Checkpoints of the published size with random weights: their cost is that of trained ones."""

from __future__ import annotations

import torch

from models.backbones import build
from models.card import Card, software_versions
from models.checkpoint import Checkpoint
from models.task import Task

WIDTH = 8


def untrained(backbone: str, task: Task) -> Checkpoint:
    """The same weights every time."""
    torch.manual_seed(0)
    card = Card(
        name=backbone, task=task, backbone=backbone, width=WIDTH, regime="idt", method="passion", missing_rates={},
        training={}, software=software_versions(),
    )  # fmt: skip
    return Checkpoint(card, build(backbone, task, WIDTH))
