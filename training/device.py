"""Where a command computes."""

from __future__ import annotations

import torch

from training.errors import UserError


def choose_device(wanted: str) -> torch.device:
    """`auto` (CUDA where there is one) or a torch device name. Raises `UserError` if it is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UserError(f"device {wanted!r} is unknown: use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {wanted!r} is not there: {torch.cuda.device_count()} CUDA devices; use cpu or auto")
    if device.type not in {"cpu", "cuda"}:
        raise UserError(f"device {wanted!r} is not supported: use auto, cpu, cuda or cuda:N")
    return device


def device_name(device: torch.device) -> str:
    """What a card says of it: the GPU's name, or the CPU's threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
