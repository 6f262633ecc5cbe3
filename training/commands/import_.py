"""`passion import`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training.errors import UserError

if TYPE_CHECKING:
    from models.task import Task


def import_(
    file: Annotated[Path, typer.Argument(help="A state dict: .pth as torch.save writes it, or .safetensors.")],
    out: Annotated[Path, typer.Argument(help="The checkpoint folder to make.")],
    backbone: Annotated[str, typer.Option(help="The network that it belongs to: rfnet, mmformer, m2ftrans, ...")],
    task: Annotated[str, typer.Option(help="A shipped task, or a YAML file.")] = "glioma",
    width: Annotated[int, typer.Option(min=1, help="Channels of the finest level.")] = 8,
    crop: Annotated[
        str | None,
        typer.Option(help="Voxels of its training crops, as 80 or 128,128,32, if not the task's patch size."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name; default: the folder's.")] = None,
    description: Annotated[str, typer.Option(help="Where it comes from, and under which licence.")] = "",
    regime: Annotated[str, typer.Option(help="What it was trained on: idt, idt_drop or pdt.")] = "idt",
    method: Annotated[str, typer.Option(help="What it was trained for: passion, none, ...")] = "passion",
    missing: Annotated[
        str | None, typer.Option(help="Missing rates that it was trained with: t1=0.2,t1ce=0.4; default: not known.")
    ] = None,
) -> None:
    """Turn weights that others trained into a checkpoint. Tensors are read, no pickle is ever run.

    Every name and shape must be the network's own; else the list of those that are not is printed and nothing is
    written.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists: choose a new folder or remove it first")
    import hashlib
    from typing import get_args

    from models.card import Card, software_versions
    from models.checkpoint import save_checkpoint
    from training.config import Regime
    from training.methods import build_method
    from training.published_weights import fitted, read_state_dict

    if regime not in get_args(Regime):
        raise UserError(f"no regime {regime!r}: choose one of {', '.join(get_args(Regime))}")
    loaded = _task(task, crop)
    build_method(method, loaded.names, len(loaded.labels))  # refuses an unknown one
    rates = _rates(missing, loaded, regime)
    network = fitted(read_state_dict(file), backbone, loaded, width, file)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    card = Card(
        name=name or out.resolve().name,
        description=description,
        task=loaded,
        backbone=backbone,
        width=width,
        regime=regime,
        method=method,
        missing_rates=rates,
        training={"imported_from": {"file": file.name, "sha256": digest}},
        software=software_versions(),
    )
    try:
        save_checkpoint(out, card, network)
    except OSError as error:
        raise UserError(f"{out}: cannot write the checkpoint ({error.strerror})") from None
    count = sum(parameter.numel() for parameter in network.parameters())
    patch = "x".join(map(str, loaded.patch_size))
    print(f"{out}: {backbone} of width {width} for task {loaded.name}, {count:,} weights, crops of {patch} voxels")


def _task(name: str, crop: str | None) -> Task:
    from pydantic import ValidationError

    from models.task import Task, TaskError, first_problem

    try:
        task = Task.load(name)
        if crop is None:
            return task
        return Task.model_validate(task.model_dump() | {"patch_size": _edges(crop)})
    except TaskError as error:
        raise UserError(str(error)) from None
    except ValidationError as error:
        raise UserError(f"--crop {crop}: {first_problem(error)}") from None


def _edges(text: str) -> tuple[int, ...]:
    try:
        edges = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        edges = ()
    if len(edges) not in {1, 3}:
        raise UserError(f"--crop {text!r}: write one whole number of voxels or three, as 80 or 128,128,32")
    return edges * 3 if len(edges) == 1 else edges


def _rates(text: str | None, task: Task, regime: str) -> dict[str, float]:
    from models.task import TaskError
    from training.splits import parse_rates

    if text is None:
        return dict.fromkeys(task.names, 0.0) if regime == "pdt" else {}
    rates = dict.fromkeys(task.names, 0.0)
    for given, rate in parse_rates(text).items():
        try:
            modality = task.canonical(given)
        except TaskError as error:
            raise UserError(f"--missing: {error}") from None
        if not 0 <= rate < 1:
            raise UserError(f"--missing {given}={rate:g}: must be at least 0 and below 1")
        rates[modality] = rate
    return rates
