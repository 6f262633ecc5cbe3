"""`passion backbones`."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from models.task import Task, TaskError, first_problem
from training.errors import UserError

GIB = 2**30


def backbones(
    names: Annotated[list[str] | None, typer.Argument(help="Only these. Default: every backbone there is.")] = None,
    task: Annotated[str, typer.Option(help="A shipped task or a YAML file.")] = "glioma",
    width: Annotated[int, typer.Option(min=1, help="Channels of the finest level.")] = 8,
    crop: Annotated[str | None, typer.Option(help="Voxels as X,Y,Z. Default: the task's patch size.")] = None,
    modalities: Annotated[str | None, typer.Option(help="Those present, such as flair+t2. Default: all.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run a window and two training steps for the memory: minutes.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where --measure runs: auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """List the backbones with parameters, memory and arithmetic. Computed from shapes alone, without data."""
    from models.backbones import BACKBONES
    from training.device import choose_device
    from training.footprint import Memory, footprint
    from training.footprint import measure as measure_memory

    chosen = names or list(BACKBONES)
    unknown = [name for name in chosen if name not in BACKBONES]
    if unknown:
        raise UserError(f"no backbone {unknown[0]!r}: choose of {', '.join(BACKBONES)}")
    resolved = choose_task(task, crop)
    mask = choose_mask(resolved, modalities)
    where = str(choose_device(device)) if measure else "computed"
    present = "+".join(n for n, there in zip(resolved.names, mask, strict=True) if there)
    size = "x".join(map(str, resolved.patch_size))
    table = Table(title=f"{resolved.name}, width {width}, crop {size}, {present}")
    table.add_column("backbone", no_wrap=True)
    for column in ("crop in\nsteps of", "parameters", "at\ninference", "training\nstep, GiB", "window,\nGiB", "GFLOP"):
        table.add_column(column, justify="right", no_wrap=True)
    misfits = []
    with Console(stderr=True).status("") as status:
        for name in chosen:
            status.update(name)
            entry = BACKBONES[name]
            try:
                cost = footprint(name, resolved, width, mask)
                memory: Memory = measure_memory(name, resolved, width, mask, where) if measure else cost.memory
            except ValueError as error:
                misfits.append(f"{name}: {error}")
                table.add_row(name, str(entry.divisor), *["-"] * 5)
                continue
            table.add_row(
                name,
                str(entry.divisor),
                f"{cost.parameters:,}",
                f"{cost.inference_parameters:,}",
                f"{memory.step / GIB:.2f}",
                f"{memory.window / GIB:.2f}",
                f"{cost.flops / 1e9:.1f}",
            )
    console = Console()
    console.print(table)
    how = f"measured on {where}" if measure else "computed, the tensors alive at the worst moment"
    notes = [
        *misfits,
        f"Memory: {how} of one PASSION training step and of one inference window. GFLOP: of the window.",
        *(f"{name}: {BACKBONES[name].source}" for name in chosen),
    ]
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True, markup=False)


def choose_task(name: str, crop: str | None) -> Task:
    """A task by name or file, with another patch size if `crop` ("X,Y,Z") is given. Raises `UserError`."""
    try:
        task = Task.load(name)
    except TaskError as error:
        raise UserError(f"--task: {error}") from None
    if crop is None:
        return task
    try:
        x, y, z = (int(part) for part in crop.replace("x", ",").split(","))
    except ValueError:
        raise UserError(f"--crop {crop!r} is not three whole numbers: write it as 80,80,80") from None
    try:
        return Task.model_validate(task.model_dump() | {"patch_size": (x, y, z)})
    except ValidationError as error:
        raise UserError(f"--crop: {first_problem(error)}") from None


def choose_mask(task: Task, modalities: str | None) -> tuple[bool, ...]:
    """Presence of each modality for names or aliases joined by `+`; all if None. Raises `UserError`."""
    if modalities is None:
        return (True,) * len(task.names)
    try:
        return task.mask(task.canonical(name.strip()) for name in modalities.split("+"))
    except TaskError as error:
        raise UserError(f"--modalities: {error}") from None
