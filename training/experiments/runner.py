"""`Runner`: an experiment's cells as processes, some at a time, each trained and then evaluated."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from training import atomic
from training.errors import UserError
from training.experiments import data
from training.experiments.children import Child
from training.experiments.definition import NOWHERE, Definition, train_config
from training.experiments.folder import ResultsFolder
from training.experiments.grid import Cell, CellFolder, arm_of, cells, identity, imbalance_of
from training.experiments.machine import git_state, machine
from training.experiments.progress import Display

POLL = 0.5
GRACE = 30.0
"""Seconds that a training run gets to finish its step and save."""


@dataclass
class Job:
    """A cell at work."""

    cell: Cell
    folder: CellFolder
    device: str
    stage: str
    child: Child
    code: dict[str, Any] = field(default_factory=git_state)
    """The state of the code when the cell began."""
    started: float = field(default_factory=time.monotonic)
    """When the present stage began."""


@dataclass(frozen=True)
class Plan:
    """How many cells at a time, on which devices, with how many threads each."""

    jobs: int
    devices: tuple[str, ...]
    threads: int


class Runner:
    """`run` works through the grid; what is finished stays, what was cut short goes on."""

    def __init__(
        self, definition: Definition, folder: ResultsFolder, source: Path | None, plan: Plan, command: str
    ) -> None:
        """`source`: the raw cases, where the definition takes real ones. `command`: what the records say was run."""
        self.definition = definition
        self.folder = folder
        self.source = source
        self.plan = plan
        self.command = command
        self.failed: dict[Cell, str] = {}

    def run(self, display: Display, *, fresh: bool = False) -> dict[Cell, str]:
        """Every cell that is not finished. Returns those that failed, with what they said last.

        `fresh`: throw away what is there. Raises `UserError` for what no cell could do without, `KeyboardInterrupt`
        after a signal: all is stopped then.
        """
        with _signals_stop(), self.folder.locked() as lock:
            self.folder.open_for(self.definition, fresh=fresh)
            data.make(self.definition, self.folder, self.source, display.say)
            self._splits(lock)
            todo = [c for c in cells(self.definition) if not finished(self.definition, self.folder, c)]
            display.start(self.definition, todo)
            self._work(todo, lock, display)
        return self.failed

    def _splits(self, lock: int) -> None:
        def run(arguments: list[str], output: Path) -> None:
            child = Child(arguments, output, threads=1, keep_open=lock)
            try:
                status = child.wait()
            finally:
                child.kill()
            if status:
                raise UserError(f"passion {arguments[0]}: {child.last_words().removeprefix('error: ')}")

        for imbalance in self.definition.imbalances:
            for seed in self.definition.seeds:
                data.draw_split(self.definition, self.folder, imbalance, seed, run)

    def _work(self, todo: Sequence[Cell], lock: int, display: Display) -> None:
        waiting = list(todo)
        running: list[Job] = []
        free = [self.plan.devices[i % len(self.plan.devices)] for i in range(self.plan.jobs)]
        try:
            while waiting or running:
                while waiting and free:
                    job = self._begin(waiting.pop(0), free.pop(0), lock)
                    running.append(job)
                    display.began(job.cell, job.stage)
                time.sleep(POLL)
                for job in list(running):
                    status = job.child.ended()
                    if status is None:
                        display.at_work(job.cell, job.stage, job.folder)
                    elif not self._next_stage(job, status, lock, display):
                        running.remove(job)
                        free.append(job.device)
        finally:
            for job in running:
                job.child.terminate()
            end = time.monotonic() + GRACE
            for job in running:
                try:
                    job.child.wait(max(0.0, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    display.say(f"{job.cell}: did not end in time, killed")
                job.child.kill()

    def _begin(self, cell: Cell, device: str, lock: int) -> Job:
        folder = self.folder.cell(cell)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.record.unlink(missing_ok=True)
        split = self.folder.split(imbalance_of(self.definition, cell), cell.seed)
        config = train_config(
            self.definition,
            cell.backbone,
            arm_of(self.definition, cell),
            cell.seed,
            self.folder.prepared.resolve(),
            split.resolve(),
            folder.out.resolve(),
        )
        content = config.model_dump(mode="json", exclude_none=True, exclude={"device"})
        atomic.write_text(folder.config, yaml.safe_dump(content, sort_keys=False))
        if not _belongs(folder, self.definition, cell):
            raise UserError(f"{folder.path}: left by another definition; throw it away with --fresh")
        if epochs_done(folder) >= config.epochs:
            return self._evaluate(cell, folder, device, lock)
        arguments = ["train", str(folder.config), "--device", device]
        if _checkpoint_there(folder):
            arguments.append("--resume")
        return Job(cell, folder, device, "train", Child(arguments, folder.output("train"), self.plan.threads, lock))

    def _evaluate(self, cell: Cell, folder: CellFolder, device: str, lock: int) -> Job:
        split = self.folder.split(imbalance_of(self.definition, cell), cell.seed)
        arguments = [
            "evaluate",
            str(folder.checkpoint),
            *data.test_cases(self.definition, self.folder, self.source, split),
            *("--out", str(folder.evaluation), "--device", device),
            *("--empty", self.definition.evaluate.empty),
        ]
        for subset in self.definition.evaluate.subsets or ():
            arguments += ["--modalities", subset]
        child = Child(arguments, folder.output("evaluate"), self.plan.threads, lock)
        return Job(cell, folder, device, "evaluate", child)

    def _next_stage(self, job: Job, status: int, lock: int, display: Display) -> bool:
        """After a stage ended: start the next. False if the cell is done with, for better or worse."""
        seconds = time.monotonic() - job.started
        arm = arm_of(self.definition, job.cell)
        wanted = train_config(self.definition, job.cell.backbone, arm, job.cell.seed, *NOWHERE).epochs
        if status == 0 and job.stage == "train" and epochs_done(job.folder) >= wanted:
            following = self._evaluate(job.cell, job.folder, job.device, lock)
            job.stage, job.child, job.started = following.stage, following.child, following.started
            display.began(job.cell, job.stage)
            return True
        if status == 0 and job.stage == "evaluate" and job.folder.scores.is_file():
            self._record(job, seconds)
            display.finished(job.cell)
            return False
        said = job.child.last_words() if status >= 0 else f"killed by {signal.Signals(-status).name}"
        self.failed[job.cell] = f"{job.stage}: {said} (see {job.folder.output(job.stage)})"
        display.failed(job.cell, self.failed[job.cell])
        return False

    def _record(self, job: Job, evaluation_seconds: float) -> None:
        card = json.loads((job.folder.checkpoint / "card.json").read_text())
        record: dict[str, Any] = {
            **job.cell.as_dict(),
            "identity": identity(self.definition, job.cell),
            "method": arm_of(self.definition, job.cell).method,
            "regime": arm_of(self.definition, job.cell).regime,
            "subjects": card["training"]["subjects"],
            "epochs": card["training"]["epochs_done"],
            "training_seconds": card["training"]["seconds"],
            "evaluation_seconds": round(evaluation_seconds, 1),
            "device": card["training"]["device"],
            "threads": self.plan.threads,
            "command": self.command,
            "software": card["software"],
            "machine": machine(),
            "code": job.code,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        atomic.write_text(job.folder.record, json.dumps(record, indent=1) + "\n")


def finished(definition: Definition, folder: ResultsFolder, cell: Cell) -> bool:
    """Trained and evaluated, under this definition."""
    files = folder.cell(cell)
    try:
        record = json.loads(files.record.read_text())
    except (OSError, ValueError):
        return False
    return bool(record.get("identity") == identity(definition, cell)) and files.scores.is_file()


def epochs_done(folder: CellFolder) -> int:
    """Epochs that the checkpoint has behind it."""
    try:
        return int(json.loads((folder.checkpoint / "resume.json").read_text())["epoch"])
    except (OSError, ValueError, KeyError):
        return 0


def _checkpoint_there(folder: CellFolder) -> bool:
    # A run killed while it saved has it under a hidden name; --resume puts it in its place.
    return folder.checkpoint.exists() or any(folder.out.glob(".checkpoint.new"))


def _belongs(folder: CellFolder, definition: Definition, cell: Cell) -> bool:
    stamp = folder.path / "identity"
    wanted = identity(definition, cell)
    if not stamp.exists() and not folder.out.exists():
        atomic.write_text(stamp, wanted)
    return stamp.exists() and stamp.read_text() == wanted


@contextmanager
def _signals_stop() -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
