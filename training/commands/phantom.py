"""`passion phantom`: synthetic patients on real anatomy, as BraTS-style folders."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.errors import UserError
from training.parallel import cores, each
from training.phantom import make_subject, subject_id, write_subject
from training.phantom.anatomy import load_anatomy


def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write <id>/<id>_flair.nii.gz and its like into.")],
    subjects: Annotated[int, typer.Option(min=1, help="How many patients to make.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Names the collection: one seed, the same bytes.")] = 1,
    spacing: Annotated[float, typer.Option(min=0.5, max=10, help="Voxel size in mm.")] = 1.0,
    shape: Annotated[
        str | None,
        typer.Option(help="Voxels as X,Y,Z. Default: 240 x 240 x 155 mm, as BraTS. Too small: patients shrink."),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one per CPU core.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace patients that are there already.")] = False,
) -> None:
    """Make synthetic patients on real anatomy (ICBM 152), offline."""
    grid = parse_shape(shape, spacing)
    ids = [subject_id(index) for index in range(1, subjects + 1)]
    present = [i for i in ids if (out / i).exists()]
    if present and not overwrite:
        raise UserError(
            f"{out} already holds {present[0]} ({len(present)} of {subjects}): choose a new folder or give --overwrite"
        )
    load_anatomy(spacing)  # says now, once, if the template is missing
    make = partial(_make_one, out, seed, grid, spacing)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("phantoms", total=subjects)
        for _ in each(make, range(1, subjects + 1), workers or cores()):
            progress.advance(bar)
    size = "x".join(map(str, grid))
    Console().print(f"{subjects} phantoms of {size} voxels at {spacing:g} mm in {out} (seed {seed})", soft_wrap=True)


def parse_shape(text: str | None, spacing: float) -> tuple[int, int, int]:
    """`"X,Y,Z"` as three voxel counts; None: BraTS's field of view at `spacing` mm. Raises `UserError`."""
    if text is None:
        return (round(240 / spacing), round(240 / spacing), round(155 / spacing))
    try:
        x, y, z = (int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise UserError(f"--shape {text!r} is not three whole numbers: write it as 120,120,78") from None
    if not all(16 <= n <= 512 for n in (x, y, z)):
        raise UserError(f"--shape {text!r}: each side must be from 16 to 512 voxels")
    return (x, y, z)


def _make_one(out: Path, seed: int, shape: tuple[int, int, int], spacing: float, index: int) -> None:
    write_subject(out, make_subject(seed, index, shape, spacing))
