"""`passion experiment`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from training.errors import UserError
from training.parallel import cores

if TYPE_CHECKING:
    from training.experiments.definition import Definition
    from training.experiments.folder import ResultsFolder
    from training.experiments.runner import Plan


def experiment(
    name: Annotated[str | None, typer.Argument(help="A shipped definition by name, or a YAML file.")] = None,
    scale: Annotated[str | None, typer.Option(help="A scale of the definition; default: its first.")] = None,
    data: Annotated[Path | None, typer.Option(help="The folder of raw cases, where the definition needs one.")] = None,
    out: Annotated[Path | None, typer.Option(help="The results folder; default: results/NAME.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Cells at a time; 0: one per device, or per core of a CPU.")] = 0,
    devices: Annotated[str, typer.Option(help="auto, cpu, or GPUs to hand out in turn: cuda:0,cuda:1.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away what the folder holds and start anew.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Only write the report, from what is finished.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the cells.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="List the shipped files.")] = False,
) -> None:
    """Run a grid of backbone x imbalance x arm x seed and write its report. A run cut short goes on where it was.

    Exit status 1 if a cell failed; the report is of the others then, and says so.
    """
    from training.experiments import files
    from training.experiments.data import check_source
    from training.experiments.folder import ResultsFolder

    console = Console()
    if listing:
        console.print(_shipped())
        return
    if name is None:
        raise UserError("name an experiment, or see them with --list")
    source = files.find(name)
    chosen = files.read(source, scale)
    folder = ResultsFolder(out or Path("results") / chosen.name)
    if dry_run:
        _cells(chosen, folder, console)
        return
    if report:
        if not folder.definition.exists():
            raise UserError(f"{folder.path}: no results to report on; run the experiment first")
        if scale is None:  # the one that was run
            chosen = files.read(source, files.read(folder.definition).scale)
        folder.check(chosen, "choose their folder with --out")
        _report(chosen, folder)
        return
    check_source(chosen, data)
    plan = _plan(jobs, devices)
    options = {"--scale": scale, "--jobs": jobs or None, "--devices": None if devices == "auto" else devices}
    command = " ".join(
        ["passion experiment", name, *(f"{option} {value}" for option, value in options.items() if value is not None)]
        + (["--data DIR"] if data is not None else [])
    )
    _run(chosen, folder, data, plan, command, fresh=fresh)


def _run(
    chosen: Definition, folder: ResultsFolder, data: Path | None, plan: Plan, command: str, *, fresh: bool
) -> None:
    from training.experiments.progress import Display
    from training.experiments.runner import Runner

    console = Console()
    try:
        with Display(console) as display:
            failed = Runner(chosen, folder, data, plan, command).run(display, fresh=fresh)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        raise typer.Exit(130) from None
    except OSError as error:
        raise UserError(f"{error.filename or folder.path}: {error.strerror or error}") from None
    _report(chosen, folder)
    if failed:
        for cell, why in failed.items():
            console.print(f"failed: {cell}: {why}", soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(1)


def _report(chosen: Definition, folder: ResultsFolder) -> None:
    """From the cells where they are, else from what was gathered from them."""
    from training.experiments.collect import collect, load
    from training.experiments.report import write

    results = collect(chosen, folder) if folder.work.is_dir() else load(folder)
    print(write(chosen, folder, results))


def _plan(jobs: int, devices: str) -> Plan:
    from training.device import choose_device
    from training.experiments.runner import Plan

    names = tuple(d.strip() for d in devices.split(",") if d.strip())
    if names in {("auto",), ()}:
        import torch

        names = tuple(f"cuda:{i}" for i in range(torch.cuda.device_count())) or ("cpu",)
    for device in names:
        choose_device(device)
    count = jobs or (min(cores(), 4) if names == ("cpu",) else len(names))
    threads = max(1, cores() // count)
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return Plan(count, names, min(threads, int(wanted)) if wanted.isdecimal() and int(wanted) else threads)


def _shipped() -> Table:
    from training.experiments.files import read, scales, shipped
    from training.experiments.grid import cells

    table = Table("name", "cells", "scales", "what it is")
    for name, path in shipped().items():
        chosen = read(path)
        table.add_row(name, str(len(cells(chosen))), ", ".join(scales(path)) or "-", chosen.description.strip())
    return table


def _cells(chosen: Definition, folder: ResultsFolder, console: Console) -> None:
    from training.experiments.data import steps_of_epoch
    from training.experiments.definition import NOWHERE, train_config
    from training.experiments.grid import arm_of, cells, imbalance_of
    from training.experiments.runner import epochs_done, finished

    table = Table("backbone", "imbalance", "arm", "seed", "epochs", "steps", "state")
    total: int | None = 0
    for cell in cells(chosen):
        arm = arm_of(chosen, cell)
        epochs = train_config(chosen, cell.backbone, arm, cell.seed, *NOWHERE).epochs
        per_epoch = steps_of_epoch(chosen, folder, imbalance_of(chosen, cell), cell.seed)
        steps = None if per_epoch is None else per_epoch * epochs
        total = None if total is None or steps is None else total + steps
        done = epochs_done(folder.cell(cell))
        state = "finished" if finished(chosen, folder, cell) else f"epoch {done}" if done else "to do"
        shown = "?" if steps is None else str(steps)
        table.add_row(cell.backbone, cell.imbalance or "-", cell.arm, str(cell.seed), str(epochs), shown, state)
    console.print(table)
    console.print(f"{len(cells(chosen))} cells, {'unknown' if total is None else total} steps in {folder.path}")
