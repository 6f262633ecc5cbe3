"""`Checkpoints`: the models that a child process has in memory."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from app.jobs.cards import CARD, ModelShelf

if TYPE_CHECKING:
    from models.predictor import Predictor

log = structlog.get_logger("worker")


class NoSuchModelError(LookupError):
    """The model was there when the job was accepted, and is no longer."""


class Checkpoints:
    """Loads a model at its first job and keeps it. Torch is imported here, in the child, and nowhere before."""

    def __init__(self, shelf: ModelShelf, device: str, overlap: float, precision: str) -> None:
        self._shelf = shelf
        self._device = device
        self._overlap = overlap
        self._precision = precision
        self._loaded: dict[str, tuple[str, Predictor]] = {}

    def get(self, name: str) -> tuple[str, Predictor]:
        """The sha256 of the model's weights, and its predictor. A model whose card names other weights is loaded anew.

        Raises `NoSuchModelError`, `app.jobs.cards.CardError`, `models.checkpoint.CheckpointError` and
        `models.predictor.OptionError`.
        """
        card = self._shelf.get(name)
        if card is None:
            raise NoSuchModelError(f"the model {name!r} is no longer served; GET /models lists those that are")
        loaded = self._loaded.get(name)
        if loaded is None or loaded[0] != card.weights_sha256:
            self._loaded.pop(name, None)  # let go of the old weights before the new ones come in
            loaded = self._loaded[name] = (card.weights_sha256, self._load(self._shelf.folder(name)))
        return loaded

    def card_sha256(self, name: str) -> str:
        """Hex SHA-256 of a model's card.json as it is now. Raises `OSError`."""
        return hashlib.sha256((self._shelf.folder(name) / CARD).read_bytes()).hexdigest()

    def leaner(self, predictor: Predictor) -> Predictor:
        """One that does the same with less memory; what the device still holds for the last attempt is let go of."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return predictor.leaner()

    def _load(self, folder: Path) -> Predictor:
        from models.checkpoint import Checkpoint
        from models.predictor import Predictor

        device = pick_device(self._device)
        checkpoint = Checkpoint.load(folder, device=device)
        predictor = Predictor(checkpoint, device, overlap=self._overlap, precision=self._precision)
        log.info("model loaded", model=folder.name, device=device, pid=os.getpid())
        return predictor


def pick_device(wanted: str) -> str:
    """The torch device for this child: `auto` is CUDA where there is one, and child i of `cuda` takes GPU i."""
    import torch
    from billiard.process import current_process

    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda":
        index = getattr(current_process(), "index", 0) or 0
        return f"cuda:{index % max(torch.cuda.device_count(), 1)}"
    return wanted
