"""`ResultsFolder`: where an experiment's files lie, and what keeps a second experiment or runner out of it."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import atomic
from training.errors import UserError
from training.experiments.definition import Definition, Imbalance
from training.experiments.files import read
from training.experiments.grid import Cell, CellFolder

SCORES, CURVES, RUNS = "scores.csv.gz", "curves.csv.gz", "runs.json"
KEPT = (SCORES, CURVES, RUNS)
"""What is gathered from the cells."""
AXES = ("imbalances", "backbones", "arms", "seeds")
WAIT = 60.0
"""Seconds that a new runner gives the runs of a killed one to save and end."""


@dataclass(frozen=True)
class ResultsFolder:
    """definition.yaml, the figures and the report, which are kept; work/ (data, runs), which is not."""

    path: Path

    @property
    def definition(self) -> Path:
        """The resolved definition."""
        return self.path / "definition.yaml"

    @property
    def work(self) -> Path:
        """Everything that can be made again."""
        return self.path / "work"

    @property
    def prepared(self) -> Path:
        """The prepared training data."""
        return self.work / "prepared"

    def phantoms(self, part: str) -> Path:
        """Raw phantoms: `train` or `test`."""
        return self.work / f"phantoms-{part}"

    def split(self, imbalance: Imbalance, seed: int) -> Path:
        """Output of `passion split`."""
        return self.work / "splits" / f"{imbalance.name}-seed{seed}"

    def cell(self, cell: Cell) -> CellFolder:
        """The files of a run."""
        return CellFolder(self.work / "runs" / cell.id)

    def open_for(self, definition: Definition, *, fresh: bool) -> None:
        """Make the folder the experiment's own. An existing one may grow by arms, seeds and the like.

        `fresh`: throw away what was run and written here before, but for notes.md. Raises `UserError` where the folder
        holds something else.
        """
        if fresh and self.definition.exists():
            for made in (self.work, self.path / "tables", self.path / "plots"):
                shutil.rmtree(made, ignore_errors=True)
            for name in ("report.md", *KEPT, self.definition.name):
                (self.path / name).unlink(missing_ok=True)
        if self.definition.exists():
            self.check(definition, "choose another folder with --out, or throw them away with --fresh")
        elif self.work.exists():
            raise UserError(f"{self.path}: has work/ but no definition.yaml; choose another folder with --out")
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            atomic.write_text(self.definition, definition.as_yaml())
        except OSError as error:
            raise UserError(f"{self.path}: cannot write the folder ({error.strerror})") from None

    def check(self, definition: Definition, remedy: str) -> None:
        """Raises `UserError` if the folder's results are those of another definition."""
        before = read(self.definition)
        changed = differences(before, definition)
        if changed:
            made = f" (made with --scale {before.scale})" if before.scale not in {None, definition.scale} else ""
            raise UserError(f"{self.path}: holds results of another definition{made}: {'; '.join(changed)}; {remedy}")

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Hold the folder alone. The descriptor goes to every child, so it stays held while one of them lives."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{self.path}: cannot use this folder ({error.strerror})") from None
        try:
            end = time.monotonic() + WAIT
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise UserError(f"{self.path}: another `passion experiment` is at work here") from None
                    time.sleep(0.2)
            yield handle
        finally:
            os.close(handle)


def differences(old: Definition, new: Definition) -> list[str]:
    """What is not the same, as `field: old -> new`. Members that an axis of the grid gains or loses do not count."""
    before, after = (d.model_dump(mode="json", exclude={"description", "scale", *AXES}) for d in (old, new))
    found = [
        f"{key}: {_show(before_flat.get(key))} -> {_show(after_flat.get(key))}"
        for before_flat, after_flat in [(_flat(before), _flat(after))]
        for key in sorted({*before_flat, *after_flat})
        if before_flat.get(key) != after_flat.get(key)
    ]
    members = {
        "imbalances": [{i.name: i.model_dump(mode="json") for i in d.imbalances} for d in (old, new)],
        "arms": [{a.name: a.training for a in d.arms} for d in (old, new)],
    }
    for axis, (known, wanted) in members.items():
        for name, member in wanted.items():
            was = known.get(name, member)
            if was != member:
                found.append(f"{axis}.{name}: {was} -> {member}")
    return found


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _show(value: Any) -> str:
    return "not set" if value is None else str(value)
