"""`passion predict --batch`: many patients on the terminal."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from models.card import Card
from training.batch import REPORT, TABLE, Batch, Row, Segment, find_patients
from training.errors import UserError

INTERRUPTED = 130


def predict_batch(root: Path, out: Path, card: Card, settings: dict[str, Any], load: Callable[[], Segment]) -> None:
    """Segment every patient in `root` that is not done. `load` is called once, if there is anything to do.

    Ends with status 1 if a patient failed, with 130 if it was stopped. Raises `UserError`.
    """
    patients = find_patients(root)
    if out.resolve() == root.resolve() or root.resolve() in out.resolve().parents:
        raise UserError(f"{out} lies in {root}, among the patients: choose a folder elsewhere")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Batch.open(out, card, settings) as batch:
        batch.start(patients)
        todo = [patient for patient in patients if not batch.done(patient)]
        rows: list[Row] = []
        try:
            with _Stop() as stop, Progress(*columns, console=console, transient=True) as progress:
                bar = progress.add_task("patients", total=len(patients), completed=len(patients) - len(todo))
                stage = progress.add_task("loading the model", total=1.0)
                segment: Segment | None = None
                for patient in todo:
                    segment = segment or load()
                    stop.here()

                    def tell(what: str, fraction: float, name: str = patient.name) -> None:
                        stop.here()
                        progress.update(stage, description=f"{name}: {what}", completed=fraction)

                    row = batch.do(patient, segment, tell)
                    rows.append(row)
                    progress.advance(bar)
                    progress.console.print(_line(row), markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            batch.save()  # the row of a patient that was to be done anew is no longer true
            done = sum(map(batch.done, patients))
            console.print(f"stopped: {done} of {len(patients)} are done; the same command goes on", highlight=False)
            raise typer.Exit(INTERRUPTED) from None
    failed = sum(row.state == "failed" for row in rows)
    print(
        f"{out / TABLE}, {REPORT}: {len(rows) - failed} patients segmented, {len(patients) - len(todo)} were done "
        f"before, {failed} failed (research software, not a medical device)"
    )
    if failed:
        raise typer.Exit(1)


def _line(row: Row) -> str:
    taken = ", ".join(f"{name}: {file.path}" for name, file in row.files.items())
    left = f"; not taken: {', '.join(row.left)}" if row.left else ""
    if row.state == "failed":
        return f"{row.patient}: failed: {row.error}"
    volumes = ", ".join(f"{name} {ml:.2f} mL" for name, ml in row.volumes_ml.items())
    warned = "".join(f"; {warning}" for warning in row.warnings)
    return f"{row.patient}: {taken}{left}; {volumes}{warned}"


class _Stop:
    """Ctrl-C, or SIGTERM as schedulers send it: remembered until a moment at which no file is half written.

    A second one ends at once; what it leaves half written has a hidden name, and the next run removes it.
    """

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, *_: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def here(self) -> None:
        """Raises `KeyboardInterrupt` if a stop was asked for."""
        if self._asked:
            raise KeyboardInterrupt
