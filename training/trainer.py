"""The training loop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from models.backbones import build
from models.card import Card, software_versions
from models.checkpoint import Checkpoint, CheckpointError, recover, save_checkpoint
from models.task import Task, first_problem
from training.cases import PreparedDataset
from training.config import TrainConfig
from training.device import choose_device, device_name
from training.errors import UserError
from training.loader import Batch, Subjects, batches
from training.missingness import MissingnessTable
from training.passion.objective import Terms, terms
from training.passion.preference import Preference
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
    beta: list[float]


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
        self.modal_weight = self._modal_weight().to(self.device)
        torch.manual_seed(config.seed)
        try:
            self.network: Any = build(config.backbone, self.task, config.width).to(self.device)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, amsgrad=True
        )
        self.state = RunState(0, 0, Preference.start(len(self.task.names)), dict.fromkeys(PARTS, 0.0), 0.0)
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
            with RunLog(self.config.out, self.state.epoch) as log:
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
        """One optimiser step."""
        x, labels = batch.x.to(self.device, non_blocking=True), batch.labels.to(self.device, non_blocking=True)
        warm_up = self.state.epoch < self.config.warmup_epochs
        distil = self.config.passion and not warm_up
        losses = terms(self.network, x, labels, batch.masks, len(self.task.labels), distil=distil)
        beta = self.state.preference.beta.to(self.modal_weight)
        if warm_up:
            total = losses.warm_up(beta, self.modal_weight)
        elif self.config.passion:
            total = losses.passion(beta, self.modal_weight)
        else:
            total = losses.baseline()
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
        self.optimiser.step()
        if distil:
            self.state.preference.record(losses.dist, losses.mask)
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
            passion=self.config.passion,
            missing_rates=rates,
            training={
                "config": config,
                "subjects": total,
                "epochs_done": self.state.epoch,
                "beta": [round(b, 6) for b in self.state.preference.beta.tolist()],
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
        loader = batches(
            self.subjects, self.state.epoch, self.config.batch_size, self.config.workers, skip=self.state.step
        )
        for batch in loader:
            started = time.monotonic()
            self.step(batch)
            self.state.step += 1
            self.state.seconds += time.monotonic() - started
            on_step(
                StepReport(
                    self.state.epoch, self.state.step, self.steps, self._means(), self.state.preference.beta.tolist()
                )
            )
            if self._stop:
                self.save()
                return False
        return True

    def _end_epoch(self) -> dict[str, Any]:
        names = self.task.names
        dist = self.state.preference.update(self.state.epoch)
        record = {
            "epoch": self.state.epoch,
            "lr": self.optimiser.param_groups[0]["lr"],
            "loss": {k: round(v, 6) for k, v in self._means().items()},
            "dist": dict(zip(names, dist.tolist(), strict=True)),
            "beta": dict(zip(names, self.state.preference.beta.tolist(), strict=True)),
            "eta": self.state.preference.eta,
            "seconds": round(self.state.seconds, 2),
        }
        self.state.epoch += 1
        self.state.step = 0
        self.state.sums = dict.fromkeys(PARTS, 0.0)
        return record

    def _add(self, total: Tensor, losses: Terms) -> None:
        for name in PARTS:
            value = total if name == "total" else getattr(losses, name).sum()
            self.state.sums[name] += value.item()

    def _means(self) -> dict[str, float]:
        return {name: value / max(self.state.step, 1) for name, value in self.state.sums.items()}

    def _modal_weight(self) -> Tensor:
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
        self.state = RunState.restore(self.folder, self.optimiser, self.config.model_dump(mode="json"))

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
    ids = read_ids(config.split / "train.txt")
    table = MissingnessTable.read(config.split / "missingness.csv", task)
    cases, masks = [], []
    for case_id in ids:
        case = dataset.case(case_id)
        if case_id not in table.masks:
            raise UserError(f"{config.split}/missingness.csv: has no row for training subject {case_id!r}")
        mask = table.masks[case_id]
        absent = [n for n, has in zip(task.names, mask, strict=True) if has and n not in case.modalities]
        if absent:
            raise UserError(f"{case.folder}: has no {', '.join(absent)}, but missingness.csv gives it to the subject")
        cases.append(case)
        masks.append(mask)
    return Subjects(cases, masks, task, config.seed, config.foreground)
