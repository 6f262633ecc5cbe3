"""`RunState`: everything that a training run needs, besides its weights, to continue as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from training.errors import UserError
from training.methods import Method
from training.ranks import ALONE, Ranks

RESUME, OPTIMISER = "resume.json", "optimiser.safetensors"


def generators(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's random generators of this process, by device type, as bytes on the CPU."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


@dataclass
class RunState:
    """Where a run stands, the same on all ranks. Stored in the checkpoint folder as JSON and safetensors: no pickle."""

    epoch: int
    """The epoch to go on with."""
    step: int
    """Steps of that epoch already done."""
    method: Method
    sums: dict[str, float]
    """Loss parts summed over the steps done of this epoch, and how often each modality was there."""
    seconds: float
    """Training time so far."""

    def files(
        self,
        optimiser: torch.optim.Optimizer,
        config: dict[str, Any],
        random: Mapping[str, Sequence[Tensor]],
    ) -> dict[str, bytes]:
        """The files to lay beside the weights; `random` has the `generators` of every rank."""
        record = {
            "epoch": self.epoch,
            "step": self.step,
            "method": self.method.state(),
            "sums": self.sums,
            "seconds": self.seconds,
            "config": config,
            "processes": len(random["cpu"]),
        }
        tensors = {
            f"{index}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
            for index, slot in optimiser.state_dict()["state"].items()
            for name, value in slot.items()
        }
        tensors |= {_key(kind, rank): state for kind, states in random.items() for rank, state in enumerate(states)}
        return {RESUME: json.dumps(record, indent=2).encode(), OPTIMISER: save_tensors(tensors)}

    @classmethod
    def restore(
        cls,
        folder: Path,
        optimiser: torch.optim.Optimizer,
        method: Method,
        config: dict[str, Any],
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> RunState:
        """Read `files` back and put the optimiser, the method and torch's random generators where they were.

        A step must have as many samples as before, on however many ranks; one that there was not keeps the generators
        it has. Raises `UserError` if nothing is there to resume, or the configuration is another.
        """
        try:
            record = json.loads((folder / RESUME).read_text())
            tensors = load_tensors((folder / OPTIMISER).read_bytes())
        except OSError:
            raise UserError(f"{folder}: nothing to resume here; train without --resume first") from None
        free = {
            "epochs",
            "device",
            "workers",
            "out",
            "data",
            "split",
            "name",
            "description",
            "batch_size",
            "accumulate",
        }
        changed = [k for k in config if k not in free and config[k] != record["config"].get(k)]
        if changed:
            raise UserError(
                f"{folder}: was trained with another {', '.join(changed)}; resume with the same configuration "
                "or choose a new `out`"
            )
        before, now = _samples(record["config"], record.get("processes", 1)), _samples(config, ranks.world)
        if before != now:
            raise UserError(
                f"{folder}: a step had {before} subjects and now would have {now}: make batch_size x accumulate x "
                f"processes {before} again or choose a new `out`"
            )
        slots: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            index, name = key.split(".", 1)
            if index != "rng":
                slots.setdefault(int(index), {})[name] = tensor
        optimiser.load_state_dict(optimiser.state_dict() | {"state": slots})
        if (state := tensors.get(_key("cpu", ranks.rank))) is not None:
            torch.set_rng_state(state)
        if device.type == "cuda" and (state := tensors.get(_key("cuda", ranks.rank))) is not None:
            torch.cuda.set_rng_state(state, device)
        method.restore(record["method"])
        return cls(
            epoch=record["epoch"],
            step=record["step"],
            method=method,
            sums=record["sums"],
            seconds=record["seconds"],
        )


def _key(kind: str, rank: int) -> str:
    return f"rng.{kind}.{rank}" if rank else f"rng.{kind}"


def _samples(config: dict[str, Any], processes: int) -> int:
    """Subjects of a step."""
    return int(config["batch_size"] * config.get("accumulate", 1) * processes)
