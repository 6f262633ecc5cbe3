"""Where a command computes."""

from __future__ import annotations

import torch

from training.errors import UserError
from training.ranks import ALONE, Ranks


def choose_device(wanted: str, ranks: Ranks = ALONE) -> torch.device:
    """`auto` (CUDA where there is one) or a torch device name. Raises `UserError` if it is not there.

    Of several processes on a node each gets a GPU of its own; so `cuda:1` would be for one alone.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UserError(f"device {wanted!r} is unknown: use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {wanted!r} is not there: {torch.cuda.device_count()} CUDA devices; use cpu or auto")
    if device.type not in {"cpu", "cuda"}:
        raise UserError(f"device {wanted!r} is not supported: use auto, cpu, cuda or cuda:N")
    if ranks.grouped and device.type == "cuda":
        if ranks.world > 1 and device.index is not None:
            raise UserError(f"device {wanted!r} is one for {ranks.world} processes: use cuda, which gives each its own")
        if ranks.local >= torch.cuda.device_count():
            raise UserError(
                f"process {ranks.local} of this node has no GPU of its own: {torch.cuda.device_count()} CUDA devices; "
                "start torchrun with as many --nproc-per-node, or use device cpu"
            )
        return torch.device("cuda", ranks.local if device.index is None else device.index)
    return device


def device_name(device: torch.device) -> str:
    """What a card says of it: the GPU's name, or the CPU's threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
