"""Where an experiment ran: the machine, and the state of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from models.card import software_versions
from training.parallel import cores

_ROOT = Path(__file__).parents[2]
_CODE = ("app", "models", "training", "worker", "pyproject.toml", "constraints.txt")


@cache
def machine() -> dict[str, Any]:
    """Processor, cores we may use, memory, GPUs, system."""
    import torch

    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory_gb": round(pages / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": platform.platform(terse=True),
        "software": software_versions(),
    }


def git_state() -> dict[str, Any]:
    """The commit of the code that runs, and whether its files differ from it; no commit where there is no git."""
    # An environment may lie inside somebody else's checkout: the commit is ours only if git knows this file.
    ours = _git("ls-files", "--error-unmatch", "--", str(Path(__file__).relative_to(_ROOT)))
    commit = None if ours is None else _git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": None if commit is None else bool(_git("status", "--porcelain", "--", *_CODE))}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
