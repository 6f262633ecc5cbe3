"""`queues`: the lines that this worker takes jobs off."""

from __future__ import annotations

import os
from pathlib import Path

from app.jobs.cards import ModelShelf
from app.jobs.lines import NEEDS, Line, Needs
from app.jobs.settings import Settings, listed

DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/dev/dxg"))
"""What NVIDIA's driver leaves, on Linux and in WSL."""


def queues(settings: Settings) -> list[str]:
    """Of every model on the shelf that this worker is to serve, for every kind of need that it meets. The shelf may
    change while it runs."""
    wanted = listed(settings.serve_models)
    found = [name for name in ModelShelf(settings.models).names() if not wanted or name.lower() in wanted]
    return [Line(needs, name).queue for name in found for needs in _met(settings)]


def _met(settings: Settings) -> list[Needs]:
    said = listed(settings.serve_devices) or ("any", kind(settings.device))
    return [needs for needs in NEEDS if needs in said]


def kind(device: str) -> Needs:
    """cuda or cpu, of a setting `device`. Told without torch, which the worker's parent does not import."""
    if device != "auto":
        return "cpu" if device == "cpu" else "cuda"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}
    return "cuda" if not hidden and any(path.exists() for path in DRIVERS) else "cpu"
