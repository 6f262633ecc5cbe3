"""`passion evaluate`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from models.card import Scores
from models.task import Task
from training.commands.windows import Window, window_size
from training.errors import UserError


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder; its card gets the scores.")],
    cases: Annotated[Path, typer.Argument(help="A folder of BraTS-style cases with labels.")],
    only: Annotated[Path | None, typer.Option(help="A list of case names, such as split/test.txt.")] = None,
    modalities: Annotated[
        list[str] | None, typer.Option(help="Only this subset, such as flair+t2; may be repeated. Default: all.")
    ] = None,
    empty: Annotated[
        str, typer.Option(help="Where a region is empty: published (1/0), brats (373.13 mm) or nan.")
    ] = "published",
    out: Annotated[
        Path | None, typer.Option(help="Folder for scores.csv and dice.png; default: <checkpoint>-evaluation.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="The data's name in the card; default: the folder's.")] = None,
    card: Annotated[
        bool, typer.Option(help="Write the scores into the checkpoint's card.json; never those of other windows.")
    ] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    overlap: Annotated[float, typer.Option(help="Share of a window that the next one covers again.")] = 0.5,
    window: Window = None,
) -> None:
    """Dice and HD95 of every region for every subset of modalities: table, CSV, picture, and the model's card.

    A region that the task gives a least volume (ET: 0.5 mL) is scored twice: ET as segmented, ET_pp with smaller
    predictions taken for none.
    """
    from models.checkpoint import Checkpoint, CheckpointError, save_card
    from models.predictor import OVERLAP, OptionError, Predictor
    from training import evaluation
    from training.device import choose_device
    from training.metrics import CONVENTIONS
    from training.plots import dice_per_subset
    from training.prepare import find_cases
    from training.splits import read_ids

    convention = next((c for c in CONVENTIONS if c == empty), None)
    if convention is None:
        raise UserError(f"--empty {empty}: use one of {', '.join(CONVENTIONS)}")
    try:
        loaded = Checkpoint.load(checkpoint)
        predictor = Predictor(loaded, choose_device(device), overlap=overlap, window=window_size(window))
    except (CheckpointError, OptionError) as error:
        raise UserError(str(error)) from error
    task = loaded.card.task
    found = find_cases(cases, task)
    if only is not None:
        wanted = read_ids(only)
        absent = sorted(set(wanted) - {c.id for c in found})
        if absent:
            raise UserError(f"{only}: {absent[0]} is not in {cases} ({len(absent)} such names)")
        found = [c for c in found if c.id in set(wanted)]
    subsets = _subsets(task, modalities)
    folder = out or checkpoint.resolve().with_name(f"{checkpoint.resolve().name}-evaluation")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot make the folder ({error.strerror}); choose another") from None
    console = Console()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("cases"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(found))
        result = evaluation.evaluate(predictor, found, subsets, convention, lambda: progress.advance(bar))
    scores = result.scores(dataset or cases.resolve().name)
    result.write_csv(folder / "scores.csv")
    dice_per_subset(scores, task, folder / "dice.png")
    if card and overlap == OVERLAP and window is None:
        save_card(checkpoint, loaded.card.model_copy(update={"scores": scores}))
    console.print(table(scores, task))
    console.print(f"{folder}/scores.csv, {folder}/dice.png", soft_wrap=True, highlight=False)


def table(scores: Scores, task: Task) -> Table:
    """The means, a line per subset, and their average."""
    regions = list(scores.subsets[0].dice)
    shown = Table(title=f"{scores.dataset}, {scores.cases} cases; empty regions: {scores.empty_region}")
    for name in task.names:
        shown.add_column(name, justify="center")
    for region in regions:
        shown.add_column(f"Dice {region}", justify="right")
    for region in regions:
        shown.add_column(f"HD95 {region}", justify="right")
    for subset in scores.subsets:
        dots = ["●" if name in subset.modalities else "○" for name in task.names]
        values = [_show(subset.dice[r], 4) for r in regions] + [_show(subset.hd95[r], 2) for r in regions]
        shown.add_row(*dots, *values)
    shown.add_section()
    averages = []
    for group, digits in (("dice", 4), ("hd95", 2)):
        for region in regions:
            values_of = [getattr(s, group)[region] for s in scores.subsets]
            defined = [v for v in values_of if v is not None]
            averages.append(_show(sum(defined) / len(defined) if defined else None, digits))
    shown.add_row(*itertools.chain(["mean"], [""] * (len(task.names) - 1), averages))
    return shown


def _show(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _subsets(task: Task, wanted: list[str] | None) -> list[tuple[str, ...]]:
    from models.task import TaskError

    if not wanted:
        return task.subsets()
    chosen = []
    for text in wanted:
        try:
            mask = task.mask(task.canonical(name) for name in text.split("+"))
        except TaskError as error:
            raise UserError(f"--modalities {text}: {error}") from None
        chosen.append(tuple(n for n, there in zip(task.names, mask, strict=True) if there))
    return list(dict.fromkeys(chosen))
