"""`RunState`: everything that a training run needs, besides its weights, to continue as if it had never stopped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from training.errors import UserError
from training.methods import Method

RESUME, OPTIMISER = "resume.json", "optimiser.safetensors"


@dataclass
class RunState:
    """Where a run stands. Stored in the checkpoint folder as JSON and safetensors: no pickle."""

    epoch: int
    """The epoch to go on with."""
    step: int
    """Steps of that epoch already done."""
    method: Method
    sums: dict[str, float]
    """Loss parts summed over the steps done of this epoch, and how often each modality was there."""
    seconds: float
    """Training time so far."""

    def files(self, optimiser: torch.optim.Optimizer, config: dict[str, Any]) -> dict[str, bytes]:
        """The files to lay beside the weights."""
        record = {
            "epoch": self.epoch,
            "step": self.step,
            "method": self.method.state(),
            "sums": self.sums,
            "seconds": self.seconds,
            "config": config,
        }
        tensors = {
            f"{index}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
            for index, slot in optimiser.state_dict()["state"].items()
            for name, value in slot.items()
        }
        tensors["rng.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        return {RESUME: json.dumps(record, indent=2).encode(), OPTIMISER: save_tensors(tensors)}

    @classmethod
    def restore(
        cls, folder: Path, optimiser: torch.optim.Optimizer, method: Method, config: dict[str, Any]
    ) -> RunState:
        """Read `files` back and put the optimiser, the method and torch's random generators where they were.

        Raises `UserError` if nothing is there to resume, or the configuration is another.
        """
        try:
            record = json.loads((folder / RESUME).read_text())
            tensors = load_tensors((folder / OPTIMISER).read_bytes())
        except OSError:
            raise UserError(f"{folder}: nothing to resume here; train without --resume first") from None
        free = {"epochs", "device", "workers", "out", "data", "split", "name", "description"}
        changed = [k for k in config if k not in free and config[k] != record["config"].get(k)]
        if changed:
            raise UserError(
                f"{folder}: was trained with another {', '.join(changed)}; resume with the same configuration "
                "or choose a new `out`"
            )
        slots: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            index, name = key.split(".", 1)
            if index != "rng":
                slots.setdefault(int(index), {})[name] = tensor
        optimiser.load_state_dict(optimiser.state_dict() | {"state": slots})
        torch.set_rng_state(tensors["rng.cpu"])
        if torch.cuda.is_available() and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        method.restore(record["method"])
        return cls(
            epoch=record["epoch"],
            step=record["step"],
            method=method,
            sums=record["sums"],
            seconds=record["seconds"],
        )
