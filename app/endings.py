"""How a command of `passion-server` ends when it cannot go on: one line and a status."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

import typer

if TYPE_CHECKING:
    from app.jobs.settings import Settings

NOT_DONE, REFUSED, INTERRUPTED = 1, 2, 130


def give_up(message: str, status: int = NOT_DONE) -> NoReturn:
    """End the command."""
    print(f"passion-server: {message}", file=sys.stderr)
    raise typer.Exit(status)


def settings_with(**changes: object) -> Settings:
    """The environment's settings with what the command line changes; ends the command for what cannot be right."""
    from pydantic import ValidationError

    from app.jobs.settings import Settings

    try:
        # pydantic checks what the type checker cannot: names and values come from the command line.
        return Settings(**{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(str(part) for part in first["loc"]).upper()
        variable = f"PASSION_{name.removeprefix('PASSION_')}: " if name else ""
        give_up(f"{variable}{first['msg'].removeprefix('Value error, ')}", REFUSED)
