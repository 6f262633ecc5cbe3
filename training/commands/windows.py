"""`--window`, as commands are given it."""

from __future__ import annotations

from typing import Annotated

import typer

from training.errors import UserError

Window = Annotated[
    str | None,
    typer.Option(
        help="Voxels of a window: 96, or 96x96x64.  [default: the patch the model was trained on]", show_default=False
    ),
]


def window_size(given: str | None) -> tuple[int, ...] | None:
    """Voxels along each axis. Raises `UserError` for anything else."""
    if given is None:
        return None
    sizes = given.split("x")
    if len(sizes) not in {1, 3} or not all(size.isdecimal() and size.isascii() for size in sizes):
        raise UserError(f"--window {given}: write voxels along each axis, such as 96 or 96x96x64")
    return tuple(int(size) for size in (sizes * 3 if len(sizes) == 1 else sizes))
