"""`Checkpoint`: a folder with card.json and weights.safetensors. No pickle is ever read or written."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from models.backbones import build
from models.card import CARD, WEIGHTS, Card, CheckpointError, load_card

__all__ = ["Checkpoint", "CheckpointError", "load_card", "recover", "save_card", "save_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A card and the network that it describes, weights in place."""

    card: Card
    network: nn.Module

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> Checkpoint:
        """Read a checkpoint in evaluation mode. Raises `CheckpointError` for anything missing, changed or unfit."""
        card = load_card(folder)
        try:
            blob = (folder / WEIGHTS).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot read {WEIGHTS} ({error.strerror})") from None
        digest = hashlib.sha256(blob).hexdigest()
        if digest != card.weights_sha256:
            raise CheckpointError(
                f"{folder}: {WEIGHTS} has sha256 {digest[:12]}..., its card says {card.weights_sha256[:12]}...: "
                "the weights were changed or the copy is incomplete; fetch the checkpoint again"
            )
        try:
            network = build(card.backbone, card.task, card.width)
            network.load_state_dict(load_tensors(blob))
        except Exception as error:  # safetensors and torch raise kinds of their own; all mean an unfit file
            raise CheckpointError(f"{folder}: the weights do not fit the card: {str(error).splitlines()[0]}") from error
        return cls(card, network.to(device).eval())


def save_checkpoint(folder: Path, card: Card, network: nn.Module, extra: Mapping[str, bytes] | None = None) -> Card:
    """Write a checkpoint, with `extra` files beside it, in one step. Returns the card with the weights' hash.

    A process killed between the two renames leaves the whole new folder under a hidden name: `recover` places it.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    blob = save_tensors(tensors)
    card = card.model_copy(update={"weights_sha256": hashlib.sha256(blob).hexdigest()})
    folder.parent.mkdir(parents=True, exist_ok=True)
    making, fresh, old = (_beside(folder, suffix) for suffix in ("making", "new", "old"))
    recover(folder)
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    try:
        for name, content in (extra or {}).items():
            (making / name).write_bytes(content)
        (making / WEIGHTS).write_bytes(blob)
        (making / CARD).write_text(card.model_dump_json(indent=2) + "\n")
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    os.replace(making, fresh)  # whole from here on
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)
    return card


def recover(folder: Path) -> None:
    """Finish a `save_checkpoint` that was killed halfway, if there is one."""
    making, fresh, old = (_beside(folder, suffix) for suffix in ("making", "new", "old"))
    shutil.rmtree(making, ignore_errors=True)
    if fresh.exists():
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def save_card(folder: Path, card: Card) -> None:
    """Replace card.json of an existing checkpoint; the weights stay."""
    temporary = folder / f".{CARD}.{os.getpid()}"
    temporary.write_text(card.model_dump_json(indent=2) + "\n")
    os.replace(temporary, folder / CARD)
