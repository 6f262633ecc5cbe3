"""`passion prepare`: a folder of scans to what training reads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from models.task import Task, TaskError
from training.errors import UserError
from training.parallel import cores
from training.prepare import Report, prepare_dataset


def prepare(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="Folder with BraTS-style subjects, at any depth, or in nnU-Net's layout."),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the prepared data set.")],
    task: Annotated[str, typer.Option(help="A shipped task by name, or a YAML file.")] = "glioma",
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one per CPU core, four at most.")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse a data set with a broken case.")] = False,
) -> None:
    """Check every case, bring it to the model's grid, crop it to the brain; re-runs do what is new only."""
    try:
        loaded = Task.load(task)
    except TaskError as error:
        raise UserError(str(error)) from None
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # A full-size case takes about 1 GB while it is prepared, hence the limit.
    processes = workers or min(cores(), 4)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("cases", total=None)
        report = prepare_dataset(
            source,
            out,
            loaded,
            workers=processes,
            strict=strict,
            on_start=lambda total: progress.update(bar, total=total),
            on_case=lambda _: progress.advance(bar),
        )
    show(report, out, Console())


def show(report: Report, out: Path, console: Console) -> None:
    """The run in a few lines, and a table of what was left out."""
    usable = len(report.prepared) + len(report.up_to_date)
    console.print(
        f"{usable} cases in {out}: {len(report.prepared)} prepared, {len(report.up_to_date)} were up to date, "
        f"{len(report.incomplete)} lack a modality, {len(report.broken)} skipped, {len(report.removed)} gone",
        soft_wrap=True,
        highlight=False,
    )
    lacking = Counter(name for absent in report.incomplete.values() for name in absent)
    if lacking:
        console.print(
            f"no file of {', '.join(f'{name} in {count}' for name, count in lacking.items())}", highlight=False
        )
    for label, value in report.label_values.items():
        console.print(f"the files write {label} as {value}", highlight=False)
    if report.broken:
        table = Table("case", "why it was skipped", title="Skipped")
        for name, why in report.broken.items():
            table.add_row(name, why)
        console.print(table)
