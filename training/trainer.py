"""The training loop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from models.backbones import build
from models.card import Card, software_versions
from models.checkpoint import Checkpoint, CheckpointError, recover, save_checkpoint
from models.layout import in_fast_layout
from models.task import Task, first_problem
from training.cases import PreparedCase, PreparedDataset
from training.config import TrainConfig
from training.device import choose_device, device_name
from training.errors import UserError
from training.loader import Batch, Loader, Subjects
from training.methods import build_method
from training.missingness import MissingnessTable
from training.passion.objective import Terms, terms
from training.run_log import RunLog
from training.run_state import RunState
from training.schedule import polynomial
from training.splits import read_ids

PARTS = ("total", "fuse", "prm", "sep", "kl", "proto")


@dataclass(frozen=True)
class StepReport:
    """What one step tells the progress display."""

    epoch: int
    step: int
    steps: int
    means: dict[str, float]
    """Loss parts, mean over the epoch so far."""


class Trainer:
    """One run: `Trainer(config).run()`. Everything is checked before the first step."""

    def __init__(self, config: TrainConfig, *, resume: bool = False) -> None:
        self.config = config
        self.folder = config.out / "checkpoint"
        recover(self.folder)
        if not resume and self.folder.exists():
            raise UserError(f"{self.folder} exists: continue it with --resume or choose a new `out`")
        self.device = choose_device(config.device)
        dataset = PreparedDataset.open(config.data)
        self.task = _task(dataset.task, config)
        self.subjects = _subjects(dataset, self.task, config)
        self.loader = Loader(self.subjects, config.batch_size, config.workers, pin=self.device.type == "cuda")
        self.modal_weight = self._modal_weight().to(self.device)
        torch.manual_seed(config.seed)
        try:
            self.network: Any = build(config.backbone, self.task, config.width).to(self.device)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, amsgrad=True
        )
        method = build_method(config.method, self.task.names, len(self.task.labels))
        self.state = RunState(0, 0, method, self._no_sums(), 0.0)
        if resume:
            self._resume()
        self._stop = False

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.subjects.cases) // self.config.batch_size)

    def run(
        self,
        on_step: Callable[[StepReport], None] = lambda _report: None,
        on_epoch: Callable[[dict[str, Any]], None] = lambda _record: None,
    ) -> bool:
        """Train to the last epoch. Returns False if a signal (SIGTERM, SIGINT) asked it to stop; all is saved then."""
        self.config.out.mkdir(parents=True, exist_ok=True)
        before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            with self.loader, RunLog(self.config.out, self.state.epoch) as log:
                while self.state.epoch < self.config.epochs:
                    if not self._epoch(on_step):
                        return False
                    record = self._end_epoch()
                    log.epoch(record)
                    self.save()
                    on_epoch(record)
            return True
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def step(self, batch: Batch) -> Terms:
        """One optimiser step. Raises `UserError` where the loss is not finite or the GPU's memory is too small."""
        try:
            return self._step(batch)
        except torch.OutOfMemoryError:
            crop = "x".join(map(str, self.task.patch_size))
            raise UserError(
                f"out of GPU memory with batch_size {self.config.batch_size} and crop {crop}: lower one of them, or "
                f"choose another backbone (`passion backbones`); the checkpoint of the last epoch is in {self.folder}"
            ) from None

    def _step(self, batch: Batch) -> Terms:
        x = in_fast_layout(batch.x.to(self.device, non_blocking=True))
        labels = batch.labels.to(self.device, non_blocking=True)
        warm_up = self.state.epoch < self.config.warmup_epochs
        method = self.state.method
        losses = terms(
            self.network,
            x,
            labels,
            batch.masks,
            len(self.task.labels),
            present=batch.present,
            distil=method.distils and not warm_up,
        )
        total = losses.warm_up(self.modal_weight) if warm_up else method.total(losses, self.modal_weight)
        self.optimiser.zero_grad()
        if not torch.isfinite(total):
            raise UserError(
                f"the loss is {total.item()} in epoch {self.state.epoch}, step {self.state.step}: "
                f"lower learning_rate; the checkpoint of the last epoch is in {self.folder}"
            )
        total.backward()
        for parameter in self.network.parameters():
            if parameter.grad is None:
                # As released: weights that a subject does not touch have gradient 0, and AdamW still moves them.
                parameter.grad = torch.zeros_like(parameter)
        if not warm_up:
            method.after_backward(self.network)
        self.optimiser.step()
        self._add(total, losses)
        return losses

    def save(self) -> None:
        """Write the checkpoint with all that --resume needs."""
        extra = self.state.files(self.optimiser, self.config.model_dump(mode="json"))
        save_checkpoint(self.folder, self.card(), self.network, extra)

    def card(self) -> Card:
        """The card of the network as it stands."""
        counts = torch.tensor([list(m) for m in self.subjects.masks]).sum(0)
        total = len(self.subjects.masks)
        rates = {n: round(1 - int(c) / total, 4) for n, c in zip(self.task.names, counts, strict=True)}
        config = self.config.model_dump(mode="json", exclude={"data", "split", "out", "name", "description"})
        return Card(
            name=self.config.name,
            description=self.config.description,
            task=self.task,
            backbone=self.config.backbone,
            width=self.config.width,
            regime=self.config.regime,
            method=self.config.method,
            missing_rates=rates,
            training={
                "config": config,
                "subjects": total,
                "epochs_done": self.state.epoch,
                "figures": self.state.method.figures(),
                "seconds": round(self.state.seconds, 1),
                "device": device_name(self.device),
            },
            software=software_versions(),
        )

    def _epoch(self, on_step: Callable[[StepReport], None]) -> bool:
        lr = polynomial(self.config.learning_rate, self.state.epoch, self.config.epochs)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.network.train()
        for batch in self.loader.epoch(self.state.epoch, skip=self.state.step):
            started = time.monotonic()
            self.step(batch)
            self.state.step += 1
            self.state.seconds += time.monotonic() - started
            on_step(StepReport(self.state.epoch, self.state.step, self.steps, self._means()))
            if self._stop:
                self.save()
                return False
        return True

    def _end_epoch(self) -> dict[str, Any]:
        method = self.state.method
        record = {
            "epoch": self.state.epoch,
            "lr": self.optimiser.param_groups[0]["lr"],
            "loss": {k: round(v, 6) for k, v in self._means().items()},
            "sep": {
                name: round(self.state.sums[f"sep/{name}"] / self.state.sums[f"seen/{name}"], 6)
                for name in self.task.names
                if self.state.sums[f"seen/{name}"]
            },
            **method.end_epoch(self.state.epoch),
            **method.figures(),
            "seconds": round(self.state.seconds, 2),
        }
        self.state.epoch += 1
        self.state.step = 0
        self.state.sums = self._no_sums()
        return record

    def _no_sums(self) -> dict[str, float]:
        by_modality = [f"{what}/{name}" for what in ("sep", "seen") for name in self.task.names]
        return dict.fromkeys((*PARTS, *by_modality), 0.0)

    def _add(self, total: Tensor, losses: Terms) -> None:
        sums = self.state.sums
        for part in PARTS:
            value = total if part == "total" else getattr(losses, part).sum()
            sums[part] += value.item()
        sep, seen = losses.sep.sum(0).tolist(), losses.present.sum(0).tolist()
        for k, name in enumerate(self.task.names):
            sums[f"sep/{name}"] += sep[k]
            sums[f"seen/{name}"] += seen[k]

    def _means(self) -> dict[str, float]:
        return {part: self.state.sums[part] / max(self.state.step, 1) for part in PARTS}

    def _modal_weight(self) -> Tensor:
        """N / N_k; under `pdt` the masks are full, and so all are 1."""
        counts = torch.tensor([list(m) for m in self.subjects.masks], dtype=torch.float32).sum(0)
        missing = [n for n, c in zip(self.task.names, counts, strict=True) if c == 0]
        if missing:
            raise UserError(
                f"{self.config.split}: no training subject has {', '.join(missing)}; "
                "lower its missing rate or take it out of the task"
            )
        return len(self.subjects.masks) / counts

    def _resume(self) -> None:
        try:
            checkpoint = Checkpoint.load(self.folder, self.device)
        except CheckpointError as error:
            raise UserError(f"nothing to resume: {error}") from None
        network: nn.Module = self.network
        network.load_state_dict(checkpoint.network.state_dict())
        self.state = RunState.restore(
            self.folder, self.optimiser, self.state.method, self.config.model_dump(mode="json")
        )

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._stop = True


def _task(task: Task, config: TrainConfig) -> Task:
    if config.crop is None:
        return task
    try:
        return Task.model_validate(task.model_dump() | {"patch_size": config.crop})
    except ValidationError as error:
        raise UserError(f"crop: {first_problem(error)}") from None


def _subjects(dataset: PreparedDataset, task: Task, config: TrainConfig) -> Subjects:
    cases = [dataset.case(case_id) for case_id in read_ids(config.split / "train.txt")]
    masks = _complete(cases, task) if config.regime == "pdt" else _assigned(cases, task, config.split)
    return Subjects(cases, masks, task, config.seed, config.foreground, config.regime)


def _complete(cases: list[PreparedCase], task: Task) -> list[tuple[bool, ...]]:
    for case in cases:
        absent = [n for n in task.names if n not in case.modalities]
        if absent:
            raise UserError(
                f"{case.folder}: has no {', '.join(absent)}, but regime pdt trains on complete subjects; use idt or "
                "idt_drop, or list complete subjects only"
            )
    return [(True,) * len(task.names)] * len(cases)


def _assigned(cases: list[PreparedCase], task: Task, split: Path) -> list[tuple[bool, ...]]:
    table = MissingnessTable.read(split / "missingness.csv", task)
    masks = []
    for case in cases:
        if case.id not in table.masks:
            raise UserError(f"{split}/missingness.csv: has no row for training subject {case.id!r}")
        mask = table.masks[case.id]
        absent = [n for n, has in zip(task.names, mask, strict=True) if has and n not in case.modalities]
        if absent:
            raise UserError(f"{case.folder}: has no {', '.join(absent)}, but missingness.csv gives it to the subject")
        masks.append(mask)
    return masks
