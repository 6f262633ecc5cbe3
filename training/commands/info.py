"""`passion info`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from models.card import CARD, INTENDED_USE, PACKAGED, WEIGHTS, Card, CheckpointError, load_card, software_versions
from training.automatic import automatic_device
from training.errors import UserError


def info(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="A checkpoint folder, or a folder of such folders. Default: the packaged ones.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """What models there are, what they take, what they find and how they scored; and where `auto` would compute.

    Reads cards, never weights. Exit status 1: a card of several cannot be read; the others are shown.
    """
    models: list[dict[str, Any]] = []
    broken: list[str] = []
    place = PACKAGED if checkpoint is None else checkpoint
    for folder in _folders(place):
        try:
            models.append(_model(folder, load_card(folder)))
        except CheckpointError as error:
            if folder == place:
                raise UserError(str(error)) from None
            broken.append(str(error))
    software, device = software_versions(), automatic_device()
    if as_json:
        about = {"schema_version": 1, "software": software, "device": device, "notice": INTENDED_USE}
        print(json.dumps(about | {"models": models, "broken": broken}, indent=1))
    else:
        _show(models, f"passion-seg {software['passion-seg']}, torch {software['torch']}; device auto is {device}")
    for line in broken:
        print(line, file=sys.stderr)
    if broken:
        raise typer.Exit(1)


def _folders(place: Path) -> list[Path]:
    """The checkpoint folders that are meant."""
    if (place / CARD).is_file():
        return [place]
    found = sorted(card.parent for card in place.glob(f"*/{CARD}") if not card.parent.name.startswith((".", "_")))
    if not found:
        what = f"no {CARD} in it nor in its folders" if place.is_dir() else "no such folder"
        raise UserError(f"{place}: {what}: give a checkpoint folder, or a folder of such folders")
    return found


def _model(folder: Path, card: Card) -> dict[str, Any]:
    """A card as `--json` prints it, without the run's record; labels and regions by name."""
    task = card.task
    weights = folder / WEIGHTS
    about = card.model_dump(mode="json", exclude={"task", "training", "schema_version"})
    return about | {
        "folder": str(folder),
        "weights_bytes": weights.stat().st_size if weights.is_file() else None,
        "task": task.name,
        "modalities": [modality.model_dump(mode="json") for modality in task.modalities],
        "labels": [label.model_dump(mode="json") for label in task.labels],
        "regions": [
            {
                "name": region.name,
                "description": region.description,
                "labels": [task.labels[index].name for index in region.labels],
            }
            for region in task.regions
        ],
        "patch_size": list(task.patch_size),
        "spacing_mm": list(task.spacing),
    }


def _show(models: list[dict[str, Any]], machine: str) -> None:
    console = Console()

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    for model in models:
        say(f"{model['name']}: {model['description']}", "bold")
        missing = "" if model["weights_bytes"] is not None else f"; {WEIGHTS} IS MISSING"
        say(f"{model['folder']}{missing}")
        about = Table(show_header=False)
        about.add_row("task", f"{model['task']}, {' x '.join(f'{n:g}' for n in model['spacing_mm'])} mm")
        about.add_row("network", f"{model['backbone']}, width {model['width']}; {model['method']}, {model['regime']}")
        for modality in model["modalities"]:
            also = f" (also {', '.join(modality['aliases'])})" if modality["aliases"] else ""
            rate = model["missing_rates"].get(modality["name"])
            share = "" if rate is None else f"; {rate:.0%} of the training subjects lacked it"
            about.add_row("modality", f"{modality['name']}{also}{share}")
        for label in model["labels"]:
            also = f" (or {', '.join(map(str, label['also_read']))})" if label["also_read"] else ""
            about.add_row("label", f"{label['value']}{also}: {label['name']}")
        for region in model["regions"]:
            about.add_row("region", f"{region['name']}: {', '.join(region['labels'])}")
        about.add_row("weights", f"sha256 {model['weights_sha256'][:12]}...")
        console.print(about)
        if model["scores"] is not None:
            console.print(_scores(model))
    say(machine)
    say(INTENDED_USE, "dim")


def _scores(model: dict[str, Any]) -> Table:
    scores = model["scores"]
    regions = list(scores["subsets"][0]["dice"]) if scores["subsets"] else []
    table = Table("modalities", title=f"Dice, {scores['cases']} cases of {scores['dataset']}")
    for region in regions:
        table.add_column(region, justify="right")
    for subset in scores["subsets"]:
        values = [subset["dice"].get(region) for region in regions]
        table.add_row("+".join(subset["modalities"]), *("-" if v is None else f"{v:.3f}" for v in values))
    return table
