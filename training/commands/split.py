"""`passion split`: who trains, who judges, and what each training subject is taken to have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from models.task import Task, TaskError
from training.cases import PreparedDataset
from training.errors import UserError
from training.missingness import MissingnessTable, assign, expected_shares, mask_ids, modality_weights, preset
from training.prepare import find_cases
from training.splits import PARTS, Names, Split, cut_to_available, parse_rates

FILES = (*(f"{part}.txt" for part in PARTS), "missingness.csv")


def split(
    data: Annotated[Path, typer.Argument(help="A prepared data set, or a folder of raw BraTS-style subjects.")],
    out: Annotated[Path, typer.Option(help="Folder for train.txt, val.txt, test.txt and missingness.csv.")],
    missing: Annotated[
        str | None, typer.Option(help="Missing rate per modality: t1=0.2,t1ce=0.4,flair=0.6,t2=0.8.")
    ] = None,
    preset_name: Annotated[
        str | None, typer.Option("--preset", help="A published imbalance: mr2468 (tenths for t1, t1ce, flair, t2).")
    ] = None,
    table: Annotated[Path | None, typer.Option(help="A published assignment (CSV) instead of a drawn one.")] = None,
    lists: Annotated[
        Path | None, typer.Option(help="Folder with published train.txt, val.txt, test.txt instead of a drawn split.")
    ] = None,
    val: Annotated[float, typer.Option(help="Validation subjects: a fraction below 1, or a count.")] = 0.1,
    test: Annotated[float, typer.Option(help="Test subjects: a fraction below 1, or a count.")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Decides the split and who misses what.")] = 1037,
    task: Annotated[str, typer.Option(help="Task of a raw folder; a prepared data set knows its own.")] = "glioma",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another split in OUT.")] = False,
) -> None:
    """Split the subjects and assign the modalities each training subject has. No option: nothing is missing."""
    if sum(option is not None for option in (missing, preset_name, table)) > 1:
        raise UserError("--missing, --preset and --table exclude one another: give one")
    if not overwrite and any((out / name).exists() for name in FILES):
        raise UserError(f"{out} already holds a split: choose a new folder or give --overwrite")
    loaded, available = subjects(data, task)
    parts = Split.draw(available, val, test, seed) if lists is None else Split.read(lists, available)
    rates: dict[str, float] | None = None
    if table is not None:
        masks = published(table, loaded, parts, available)
    else:
        rates = preset(preset_name, loaded) if preset_name else parse_rates(missing) if missing else {}
        rates = {_canonical(loaded, name): rate for name, rate in rates.items()}
        masks = assign(parts.train, rates, loaded, seed).masks
    fitted, changed = cut_to_available(masks, available)
    assigned = MissingnessTable(loaded.names, fitted)
    modality_weights(assigned)  # refuses a table in which a modality never occurs, before anything is written
    parts.write(out)
    assigned.write(out / "missingness.csv")

    console = Console()
    console.print(
        f"{len(parts.train)} train, {len(parts.val)} val, {len(parts.test)} test subjects in {out}",
        soft_wrap=True,
        highlight=False,
    )
    if changed:
        console.print(f"{changed} subjects lack a modality they were dealt; their rows say what they have")
    show(assigned, loaded, rates, console)


def subjects(data: Path, task: str) -> tuple[Task, dict[str, tuple[bool, ...]]]:
    """The task of a data set, and by subject which modalities there are files for. Raises `UserError`."""
    if (data / "dataset.json").is_file():
        dataset = PreparedDataset.open(data)
        return dataset.task, {i: dataset.task.mask(dataset.case(i).modalities) for i in dataset.ids}
    try:
        loaded = Task.load(task)
    except TaskError as error:
        raise UserError(str(error)) from None
    return loaded, {c.id: loaded.mask(c.images) for c in find_cases(data, loaded) if c.problem is None}


def published(
    path: Path, task: Task, parts: Split, available: dict[str, tuple[bool, ...]]
) -> dict[str, tuple[bool, ...]]:
    """The rows of a published table under the data set's own ids, for exactly the training subjects."""
    names = Names(available)
    masks: dict[str, tuple[bool, ...]] = {}
    for listed, mask in MissingnessTable.read(path, task).masks.items():
        name = names.match(listed)
        if name is None:
            raise UserError(f"{path}: {listed} is no subject of the data set")
        masks[name] = mask
    lacking = [name for name in parts.train if name not in masks]
    if lacking:
        raise UserError(
            f"{path}: no row for training subject {lacking[0]} ({len(lacking)} in all); give the split that belongs "
            "to the table with --lists"
        )
    return {name: masks[name] for name in parts.train}


def show(table: MissingnessTable, task: Task, rates: dict[str, float] | None, console: Console) -> None:
    """Realised missing rates, beside the expected ones where rates were asked for."""
    expected = {}
    if rates is not None:
        subsets = list(mask_ids(task))
        shares = expected_shares([rates.get(n, 0.0) for n in task.names], subsets)
        expected = {
            n: 1 - sum(p for p, m in zip(shares, subsets, strict=True) if m[k]) for k, n in enumerate(task.names)
        }
    grid = Table(
        "modality", "asked", "expected", "realised", "have it", "miss it", "weight N/N_k", title="Missing rates"
    )
    total = len(table.masks)
    weights = modality_weights(table)
    for name, rate in table.rates().items():
        asked = "" if rates is None else f"{rates.get(name, 0.0):.3f}"
        hoped = f"{expected[name]:.3f}" if expected else ""
        gone = round(rate * total)
        grid.add_row(name, asked, hoped, f"{rate:.3f}", str(total - gone), str(gone), f"{weights[name]:.3f}")
    console.print(grid)


def _canonical(task: Task, name: str) -> str:
    try:
        return task.canonical(name)
    except TaskError as error:
        raise UserError(f"--missing: {error}") from None
