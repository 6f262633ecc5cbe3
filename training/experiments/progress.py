"""`Display`: a line per cell: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from training.experiments.definition import NOWHERE, Definition, train_config
from training.experiments.grid import Cell, CellFolder, arm_of, cells


class Display:
    """Told by the runner; starts no thread, since the runner forks."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
            disable=not console.is_terminal,
        )
        self._ids: dict[Cell, TaskID] = {}
        self._epochs = 0
        self._total = 0
        self._done = 0

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def start(self, definition: Definition, todo: list[Cell]) -> None:
        """Before the first cell."""
        self._total = len(cells(definition))
        self._done = self._total - len(todo)
        arm = arm_of(definition, cells(definition)[0])
        self._epochs = train_config(definition, definition.backbones[0], arm, 0, *NOWHERE).epochs
        self.say(f"{self._total} cells, {self._done} finished before")

    def began(self, cell: Cell, stage: str) -> None:
        """A cell's stage was started."""
        if not self._console.is_terminal:
            self.say(f"{cell}: {stage}")
        if cell not in self._ids:
            self._ids[cell] = self._bars.add_task(str(cell), total=self._epochs, state=stage)

    def at_work(self, cell: Cell, stage: str, folder: CellFolder) -> None:
        """A look at a running cell."""
        if self._console.is_terminal:
            last = _last(folder)
            epoch = last["epoch"] + 1 if last else 0
            state = f"epoch {epoch}/{self._epochs} loss {last['loss']['total']:.3f}" if last else "starting"
            shown = state if stage == "train" else stage
            self._bars.update(self._ids[cell], completed=epoch, state=shown, refresh=True)

    def finished(self, cell: Cell) -> None:
        """Trained and evaluated."""
        self._done += 1
        self._end(cell, "finished")

    def failed(self, cell: Cell, why: str) -> None:
        """Given up."""
        self._end(cell, f"FAILED: {why}")

    def _end(self, cell: Cell, state: str) -> None:
        self._bars.remove_task(self._ids.pop(cell))
        self._bars.refresh()
        self.say(f"{cell}: {state} ({self._done} of {self._total})")


def _last(folder: CellFolder) -> dict[str, Any] | None:
    """The last whole line of the log."""
    try:
        lines = folder.log.read_text().splitlines()
        record: dict[str, Any] = json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return None
    return record if "loss" in record and "epoch" in record else None
