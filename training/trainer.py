"""The training loop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.backbones import build
from models.card import Card, software_versions
from models.checkpoint import Checkpoint, CheckpointError, recover, save_checkpoint
from models.heap import kept_heap
from models.precision import PrecisionError, check_precision
from models.task import Task, first_problem
from training.cases import PreparedCase, PreparedDataset
from training.compiled import compile_shared
from training.config import TrainConfig
from training.device import choose_device, device_name
from training.errors import UserError
from training.loader import Batch, Loader, Subjects
from training.loss import Loss, Outcome
from training.methods import build_method
from training.missingness import MissingnessTable
from training.passion.objective import Terms
from training.ranks import ALONE, Ranks
from training.run_log import RunLog
from training.run_state import RunState, generators
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
    """One run: `Trainer(config).run()`. Everything is checked before the first step.

    With `ranks` one process of several, which all do the same. Only the main one writes; what the state holds is the
    same on all of them after every step.
    """

    def __init__(self, config: TrainConfig, *, resume: bool = False, ranks: Ranks = ALONE) -> None:
        self.config = config
        self.ranks = ranks
        self.device = choose_device(config.device, ranks)
        if self.device.type == "cuda" and ranks.grouped:
            torch.cuda.set_device(self.device)  # NCCL's
        try:
            check_precision(config.precision, self.device)
        except PrecisionError as error:
            raise UserError(str(error)) from None
        self.folder = config.out / "checkpoint"
        if ranks.main:
            recover(self.folder)
        ranks.wait()
        if not resume and self.folder.exists():
            raise UserError(f"{self.folder} exists: continue it with --resume or choose a new `out`")
        dataset = PreparedDataset.open(config.data)
        self.task = _task(dataset.task, config)
        self.subjects = _subjects(dataset, self.task, config)
        self._check_ranks()
        self.loader = Loader(self.subjects, config.batch_size, config.workers, pin=self.device.type == "cuda")
        self.modal_weight = self._modal_weight().to(self.device)
        torch.manual_seed(config.seed)
        try:
            self.network: Any = build(config.backbone, self.task, config.width).to(self.device)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            amsgrad=True,
            fused=True,
        )
        method = build_method(config.method, self.task.names, len(self.task.labels))
        self.state = RunState(0, 0, method, self._no_sums(), 0.0)
        ranks.diverge(config.seed)
        if resume:
            self._resume()
        if config.compile:
            compile_shared(self.network)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # crops have one size: the best algorithm for it is worth a search
        self._loss = Loss(
            self.network, method, self.modal_weight, len(self.task.labels), ranks, config.precision, self._graphs
        )
        self._ranks_loss = ranks.wrap(self._loss)
        self._stop = False

    @property
    def steps(self) -> int:
        """Steps of an epoch, on every rank."""
        return -(-len(self.subjects.cases) // (self._share * self.ranks.world))

    @property
    def _share(self) -> int:
        """Subjects of this process in a whole step."""
        return self.config.batch_size * self.config.accumulate

    @property
    def _graphs(self) -> bool:
        """Whether steps are recorded. What ranks exchange, and what a graph of torch.compile's does, is not."""
        config = self.config
        alone = self._share == 1 and not self.ranks.grouped
        return self.device.type == "cuda" and config.graphs and alone and not config.compile

    def run(
        self,
        on_step: Callable[[StepReport], None] = lambda _report: None,
        on_epoch: Callable[[dict[str, Any]], None] = lambda _record: None,
    ) -> bool:
        """Train to the last epoch. Returns False if a signal (SIGTERM, SIGINT) asked it to stop; all is saved then."""
        if self.ranks.main:
            self.config.out.mkdir(parents=True, exist_ok=True)
        before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            log_file = RunLog(self.config.out, self.state.epoch) if self.ranks.main else nullcontext()
            with self._own_ground(), self.loader, log_file as log:
                while self.state.epoch < self.config.epochs:
                    if not self._epoch(on_step):
                        return False
                    record = self._end_epoch()
                    if log is not None:
                        log.epoch(record)
                    self.save()
                    on_epoch(record)
            return True
        except BaseException:
            if self.ranks.grouped:
                # The process is about to end and to say why; torchrun's SIGTERM, once it misses a rank, must not be
                # quicker.
                before = {}
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _own_ground(self) -> AbstractContextManager[Any]:
        """What steps run on: a heap that keeps its memory, or a stream of their own, as `Captured` records."""
        if self.device.type == "cpu":
            return kept_heap()
        return torch.cuda.stream(torch.cuda.Stream(self.device))

    def step(self, *batches: Batch) -> Terms:
        """One optimiser step on the batches of this rank, whose gradients add up. Returns this rank's figures.

        Raises `UserError` where the loss is not finite or the GPU's memory is too small.
        """
        try:
            return self._step(batches)
        except torch.OutOfMemoryError:
            crop = "x".join(map(str, self.task.patch_size))
            raise UserError(
                f"out of GPU memory with batch_size {self.config.batch_size} and crop {crop}: lower one of them, or "
                f"choose another backbone (`passion backbones`); the checkpoint of the last epoch is in {self.folder}"
            ) from None

    def _step(self, batches: Sequence[Batch]) -> Terms:
        warm_up = self.state.epoch < self.config.warmup_epochs
        method = self.state.method
        counted = self._counted(batches) if method.distils and not warm_up else None
        settled = method.waits and not warm_up and self.config.accumulate > 1
        if settled:
            self._look_ahead(batches, counted)
        self.optimiser.zero_grad()
        outcomes = []
        for number, batch in enumerate(batches, 1):
            with nullcontext() if number == len(batches) else self._gradients_stay():
                outcome: Outcome = self._ranks_loss(batch, counted, warm_up, settled)
                # Over ranks gradients are averaged, but a step's loss is the sum over its samples.
                (outcome.total * self.ranks.world).backward()
            outcomes.append(outcome._replace(total=outcome.total.detach()))
        losses = Terms.joined([outcome.losses for outcome in outcomes])
        figures = _sums(outcomes, losses)
        for parameter in self.network.parameters():
            if parameter.grad is None:
                # As released: weights that a subject does not touch have gradient 0, and AdamW still moves them.
                parameter.grad = torch.zeros_like(parameter)
        if not warm_up:
            if not method.waits:
                for number in range(method.sums):
                    parts = [outcome.given[number] for outcome in outcomes]
                    method.take(self.ranks.sum(torch.stack(parts).sum(0)), number)
            with self.ranks.alike((self.config.seed, self.state.epoch, self.state.step), self.device):
                method.after_backward(self.network)
        self.optimiser.step()
        # Looked at last: until here a GPU need not wait for this process.
        sums = self.ranks.sum(figures.to("cpu", torch.float64))
        if not torch.isfinite(sums[0]):
            raise UserError(
                f"the loss is {sums[0].item()} in epoch {self.state.epoch}, step {self.state.step}: "
                f"lower learning_rate; the checkpoint of the last epoch is in {self.folder}"
            )
        for name, value in zip(self.state.sums, sums.tolist(), strict=True):
            self.state.sums[name] += value
        return losses

    def _counted(self, batches: Sequence[Batch]) -> list[int] | None:
        """The classes that every sample of the step has, on all ranks; None where the one batch knows by itself."""
        if len(batches) == 1 and self.ranks.world == 1:
            return None
        classes = len(self.task.labels)
        lack = torch.zeros(classes, dtype=torch.int64)
        for labels in (labels for batch in batches for labels in batch.labels):
            lack += torch.bincount(labels.flatten().long(), minlength=classes) == 0
        return torch.nonzero(self.ranks.sum(lack) == 0).flatten().tolist()

    @torch.no_grad()
    def _look_ahead(self, batches: Sequence[Batch], counted: list[int] | None) -> None:
        """Let the method take its sums over all samples before the first of several batches is run for its gradient.

        Keeping all their maps instead would cost the memory that accumulation is there to save. Dropout is the same
        when the batches run again.
        """
        method = self.state.method
        for number in range(method.sums):
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                parts = [method.give(self._loss.terms(batch, counted), number) for batch in batches]
            method.take(self.ranks.sum(torch.stack(parts).sum(0)), number)

    def _gradients_stay(self) -> AbstractContextManager[None]:
        """Gradients add up here and go to the other ranks with the last batch's."""
        loss = self._ranks_loss
        return loss.no_sync() if isinstance(loss, DistributedDataParallel) else nullcontext()

    def save(self) -> None:
        """Write the checkpoint with all that --resume needs; to be called by all ranks, written by the main one."""
        random = {kind: self.ranks.gather(state) for kind, state in generators(self.device).items()}
        if self.ranks.main:
            extra = self.state.files(self.optimiser, self.config.model_dump(mode="json"), random)
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
                "processes": self.ranks.world,
            },
            software=software_versions(),
        )

    def _epoch(self, on_step: Callable[[StepReport], None]) -> bool:
        lr = polynomial(self.config.learning_rate, self.state.epoch, self.config.epochs)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.network.train()
        for parts in self._parts():
            started = time.monotonic()
            self.step(*parts)
            self.state.step += 1
            self.state.seconds += time.monotonic() - started
            on_step(StepReport(self.state.epoch, self.state.step, self.steps, self._means()))
            if self.ranks.any(self._stop):  # a signal comes to one rank first
                self.save()
                return False
        return True

    def _parts(self) -> Iterator[list[Batch]]:
        """By step, this rank's batches; one without a sample where the epoch's last step has none for it."""
        config, state = self.config, self.state
        order = self.ranks.share(self.subjects.order(state.epoch), self._share)
        skip = state.step * config.accumulate
        loader = self.loader.epoch(state.epoch, skip, order)
        for _ in range(state.step, self.steps):
            yield list(islice(loader, config.accumulate)) or [self._no_batch()]

    def _no_batch(self) -> Batch:
        size = self.task.patch_size
        return Batch(torch.zeros(0, len(self.task.names), *size), torch.zeros(0, *size, dtype=torch.uint8), [], [])

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
        """In the order of `_sums`."""
        by_modality = [f"{what}/{name}" for what in ("sep", "seen") for name in self.task.names]
        return dict.fromkeys((*PARTS, *by_modality), 0.0)

    def _means(self) -> dict[str, float]:
        return {part: self.state.sums[part] / max(self.state.step, 1) for part in PARTS}

    def _check_ranks(self) -> None:
        ids, world = [case.id for case in self.subjects.cases], self.ranks.world
        if len(ids) < world:
            raise UserError(f"{self.config.split}: {len(ids)} training subjects for {world} processes: start fewer")
        what = self.config.model_dump(exclude={"data", "split", "out", "device", "workers"})
        if not self.ranks.agree((what, ids, self.subjects.masks)):
            raise UserError("the processes have different configurations or training subjects: give all nodes the same")

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
            self.folder,
            self.optimiser,
            self.state.method,
            self.config.model_dump(mode="json"),
            self.device,
            self.ranks,
        )

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._stop = True


def _sums(outcomes: Sequence[Outcome], losses: Terms) -> Tensor:
    """A step's loss parts, `PARTS` and by modality, summed over this rank's samples."""
    parts = [getattr(losses, part).sum() for part in PARTS[1:]]
    scalars = torch.stack([torch.stack([o.total for o in outcomes]).sum(), *parts])
    return torch.cat([scalars, losses.sep.sum(0), losses.present.sum(0)])


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
