"""`passion split`: who trains, who judges, and what each training subject is taken to have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from models.task import Task, TaskError
from training import published
from training.cases import PreparedDataset
from training.errors import UserError
from training.missingness import MissingnessTable, assign, expected_shares, mask_ids, modality_weights, preset
from training.prepare import find_cases, is_nnunet
from training.splits import PARTS, Fitted, Names, Split, cut_to_available, parse_rates

FILES = (*(f"{part}.txt" for part in PARTS), "missingness.csv")

Masks = dict[str, tuple[bool, ...]]


def split(
    data: Annotated[
        Path, typer.Argument(help="A prepared data set, or raw subjects (BraTS-style folders or nnU-Net's layout).")
    ],
    out: Annotated[Path, typer.Option(help="Folder for train.txt, val.txt, test.txt and missingness.csv.")],
    missing: Annotated[
        str | None, typer.Option(help="Missing rate per modality: t1=0.2,t1ce=0.4,flair=0.6,t2=0.8.")
    ] = None,
    preset_name: Annotated[
        str | None,
        typer.Option(
            "--preset",
            help="Missing rates of t1, t1ce, flair and t2 in tenths, as mr2468. "
            f"Published: {', '.join(published.IMBALANCES)}.",
        ),
    ] = None,
    published_name: Annotated[
        str | None,
        typer.Option(
            "--published",
            help="The released BraTS2020 lists and assignment of a published imbalance; nothing is drawn.",
        ),
    ] = None,
    table: Annotated[Path | None, typer.Option(help="An assignment (CSV) instead of a drawn one.")] = None,
    lists: Annotated[
        Path | None, typer.Option(help="Folder with train.txt, val.txt, test.txt instead of a drawn split.")
    ] = None,
    val: Annotated[float, typer.Option(help="Validation subjects: a fraction below 1, or a count.")] = 0.1,
    test: Annotated[float, typer.Option(help="Test subjects: a fraction below 1, or a count.")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Decides the split and who misses what.")] = 1037,
    task: Annotated[str, typer.Option(help="Task of a raw folder; a prepared data set knows its own.")] = "glioma",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another split in OUT.")] = False,
) -> None:
    """Split the subjects and assign the modalities each training subject has.

    Without an option the assignment is what the files say. Rates, or a table, are dealt on top: a subject never gets
    what there is no file of.
    """
    if sum(option is not None for option in (missing, preset_name, published_name, table)) > 1:
        raise UserError("--missing, --preset, --published and --table exclude one another: give one")
    if published_name is not None and lists is not None:
        raise UserError("--published brings its own lists: leave --lists out")
    if not overwrite and any((out / name).exists() for name in FILES):
        raise UserError(f"{out} already holds a split: choose a new folder or give --overwrite")
    loaded, available, unusable = subjects(data, task)
    if not available:
        first, why = next(iter(unusable.items()), ("dataset.json", "lists no case"))
        raise UserError(f"{data}: there is no subject to split; {first}: {why}")
    rates: dict[str, float] | None = None
    if published_name is not None:
        parts, dealt = published.load(published_name, loaded, available)
    else:
        parts = Split.draw(available, val, test, seed) if lists is None else Split.read(lists, available)
        if preset_name is not None or missing is not None:
            rates = preset(preset_name, loaded) if preset_name else parse_rates(missing) if missing else {}
            rates = {_canonical(loaded, name): rate for name, rate in rates.items()}
            dealt = assign(parts.train, rates, loaded, seed).masks
        elif table is not None:
            dealt = from_table(table, loaded, parts, available)
        else:
            dealt = {name: available[name] for name in parts.train}
    fitted = cut_to_available(dealt, available)
    assigned = MissingnessTable(loaded.names, fitted.masks)
    modality_weights(assigned)  # refuses a table in which a modality never occurs, before anything is written
    parts.write(out)
    assigned.write(out / "missingness.csv")

    console = Console()
    console.print(
        f"{len(parts.train)} train, {len(parts.val)} val, {len(parts.test)} test subjects in {out}",
        soft_wrap=True,
        highlight=False,
    )
    tell(fitted, assigned, available, unusable, console)
    if preset_name in published.IMBALANCES and lists is None and not published.lacking(available):
        console.print(
            f"drawn with seed {seed}; --published {preset_name} takes the released lists and assignment",
            highlight=False,
        )
    show(assigned, available, loaded, rates, console)


def subjects(data: Path, task: str) -> tuple[Task, Masks, dict[str, str]]:
    """The task of a data set; by subject, which modalities there are files for; and, of raw subjects, who cannot be
    used and why. Raises `UserError`."""
    if (data / "dataset.json").is_file() and not is_nnunet(data):
        dataset = PreparedDataset.open(data)
        return dataset.task, {i: dataset.task.mask(dataset.case(i).modalities) for i in dataset.ids}, {}
    try:
        loaded = Task.load(task)
    except TaskError as error:
        raise UserError(str(error)) from None
    cases = find_cases(data, loaded)
    unusable = {c.id: c.problem for c in cases if c.problem is not None}
    return loaded, {c.id: loaded.mask(c.images) for c in cases if c.problem is None}, unusable


def from_table(path: Path, task: Task, parts: Split, available: Masks) -> Masks:
    """The rows of a table under the data set's own ids, for exactly the training subjects."""
    names = Names(available)
    masks: Masks = {}
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


def tell(fitted: Fitted, table: MissingnessTable, available: Masks, unusable: dict[str, str], console: Console) -> None:
    """What the files have to do with the table, and who was left out."""
    if unusable:
        first, why = next(iter(unusable.items()))
        console.print(
            f"{len(unusable)} left out, for they cannot be used; {first}: {why}", highlight=False, markup=False
        )
    incomplete = sum(not all(available[name]) for name in table.masks)
    if incomplete:
        console.print(f"{incomplete} training subjects lack a modality's file", highlight=False)
    if fitted.cut:
        console.print(
            f"{len(fitted.cut)} were dealt a modality that they have no file of, and lost it", highlight=False
        )
    if fitted.kept:
        console.print(
            f"{len(fitted.kept)} have no file of anything they were dealt: they keep what they have", highlight=False
        )


def show(
    table: MissingnessTable, available: Masks, task: Task, rates: dict[str, float] | None, console: Console
) -> None:
    """Realised missing rates beside those asked: subjects without a file, and those only taken to miss it."""
    expected = {}
    if rates is not None:
        subsets = list(mask_ids(task))
        shares = expected_shares([rates.get(n, 0.0) for n in task.names], subsets)
        expected = {
            n: 1 - sum(p for p, m in zip(shares, subsets, strict=True) if m[k]) for k, n in enumerate(task.names)
        }
    grid = Table(
        *("modality", "asked", "expected", "realised", "have it", "no file", "left out", "weight N/N_k"),
        title="Missing rates",
    )
    total = len(table.masks)
    weights = modality_weights(table)
    for k, (name, rate) in enumerate(table.rates().items()):
        asked = "" if rates is None else f"{rates.get(name, 0.0):.3f}"
        hoped = f"{expected[name]:.3f}" if expected else ""
        gone = round(rate * total)
        no_file = sum(not available[subject][k] for subject in table.masks)
        counts = (str(total - gone), str(no_file), str(gone - no_file))
        grid.add_row(name, asked, hoped, f"{rate:.3f}", *counts, f"{weights[name]:.3f}")
    console.print(grid)


def _canonical(task: Task, name: str) -> str:
    try:
        return task.canonical(name)
    except TaskError as error:
        raise UserError(f"--missing: {error}") from None
