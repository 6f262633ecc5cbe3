"""The loader: crops of prepared cases, the same for the same seed and epoch whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from models.intake import Box
from models.task import Task
from training.augment import augment, crop_start
from training.cases import PreparedCase
from training.config import Regime
from training.errors import UserError
from training.loader_process import obey_parent, starting

Mask = tuple[bool, ...]
Sample = tuple[Tensor, Tensor, Mask, Mask]

PREFETCH = 2
"""Batches that a worker keeps ready, in shared memory."""


@dataclass(frozen=True)
class Batch:
    """A training batch."""

    x: Tensor
    """(B, K, D, H, W) float32; channels of missing modalities are 0."""
    labels: Tensor
    """(B, D, H, W) class indices, uint8."""
    masks: list[Mask]
    """What the fused path is given."""
    present: list[Mask]
    """The modalities in x, never fewer than in `masks`."""

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; the name that torch's loader calls."""
        return Batch(self.x.pin_memory(), self.labels.pin_memory(), self.masks, self.present)


@dataclass(frozen=True)
class Subjects:
    """The training subjects, what each one has, and how crops are drawn from them."""

    cases: list[PreparedCase]
    masks: list[Mask]
    task: Task
    seed: int
    foreground: float = 0.0
    regime: Regime = "idt"

    def order(self, epoch: int) -> list[int]:
        """Every subject once, shuffled by seed and epoch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.cases))
        return [int(i) for i in order]

    def subset(self, index: int, epoch: int) -> Mask:
        """What the fused path is given of a subject in an epoch: all it has, or a non-empty subset, drawn uniformly."""
        mask = self.masks[index]
        if self.regime == "idt":
            return mask
        there = [k for k, has in enumerate(mask) if has]
        drawn = int(np.random.default_rng([self.seed, epoch, index, 2]).integers(1, 2 ** len(there)))
        kept = {k for place, k in enumerate(there) if drawn >> place & 1}
        return tuple(k in kept for k in range(len(mask)))

    def draw(self, index: int, epoch: int) -> Sample:
        """An augmented crop of one subject: images (K, D, H, W), class indices (D, H, W), mask, present."""
        case, size = self.cases[index], self.task.patch_size
        mask = self.subset(index, epoch)
        # Under pdt everything is there: the separate decoder learns from all, whatever the fused path is given.
        present = self.masks[index] if self.regime == "pdt" else mask
        rng = np.random.default_rng([self.seed, epoch, index, 1])
        centre = case.labelled_voxel(rng) if rng.random() < self.foreground else None
        start = crop_start(case.shape, size, rng, centre)
        box = Box(
            (start[0], start[1], start[2]), (start[0] + size[0], start[1] + size[1], start[2] + size[2])
        )  # reaches outside, into 0, where the case is smaller than a crop
        there = [name for name, has in zip(self.task.names, present, strict=True) if has]
        images = np.stack([case.normalised(name, box) for name in there])
        augmented, labels = augment(images, case.classes(box), rng)
        x = np.zeros((len(present), *size), np.float32)
        x[list(present)] = augmented
        return torch.from_numpy(x), torch.from_numpy(labels), mask, present


Draw = tuple[int, int]
"""A subject and an epoch."""


class Loader:
    """Batches, epoch after epoch, drawn by `workers` processes that live from the first epoch to `close`.

    0 workers draw in this process, when a batch is asked for. The batches are the same for any number. `pin`: in
    page-locked memory, from which a copy to a GPU runs beside the work on it.

        with Loader(subjects, batch_size=1, workers=2) as loader:
            for batch in loader.epoch(0):
                ...
    """

    def __init__(self, subjects: Subjects, batch_size: int, workers: int, pin: bool = False) -> None:
        self.subjects, self.batch_size = subjects, batch_size
        self._to_draw: list[list[Draw]] = []
        self._loader = DataLoader(
            _Samples(subjects),
            batch_sampler=self._to_draw,  # read anew in every epoch
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin,
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCH if workers else None,
            # As `training.parallel`: a child must not inherit threads, nor what they hold of locks and of CUDA.
            multiprocessing_context="spawn" if workers else None,
            worker_init_fn=obey_parent,
            # Its own, or the loader draws from the generator that dropout uses, and a resumed run would differ.
            generator=torch.Generator(),
        )

    def epoch(self, epoch: int, skip: int = 0, order: Sequence[int] | None = None) -> Iterator[Batch]:
        """The batches of an epoch, from number `skip` on; of the subjects in `order` where they are but a rank's share.

        Raises `UserError` for a prepared case that is damaged.
        """
        order = (self.subjects.order(epoch) if order is None else order)[skip * self.batch_size :]
        first = range(0, len(order), self.batch_size)
        self._to_draw[:] = [[(index, epoch) for index in order[i : i + self.batch_size]] for i in first]
        with starting():
            drawn = iter(self._loader)
        while True:
            try:
                batch: Batch | UserError | None = next(drawn, None)
            except (ConnectionError, EOFError, FileNotFoundError) as error:  # it died as it handed a batch over
                raise _killed(error) from None
            if batch is None:
                return
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def close(self) -> None:
        """End the worker processes, if there are any; a later epoch starts new ones."""
        running = self._loader._iterator
        self._loader._iterator = None
        if isinstance(running, _MultiProcessingDataLoaderIter):
            running._shutdown_workers()  # not left to its last reference: a traceback may hold one

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Close. A worker's death, which torch reports wherever the training process stands, is put as `UserError`."""
        try:
            self.close()
        except RuntimeError as death:  # even here
            if not _is_death(death):
                raise
            raise _killed(death) from None
        if _is_death(error):
            raise _killed(error) from None


def batches(subjects: Subjects, epoch: int, batch_size: int, workers: int, skip: int = 0) -> Iterator[Batch]:
    """The batches of one epoch alone, from number `skip` on."""
    with Loader(subjects, batch_size, workers) as loader:
        yield from loader.epoch(epoch, skip)


def _is_death(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def _killed(error: BaseException | None) -> UserError:
    return UserError(
        f"a process of the loader was killed ({' '.join(str(error).split())}), perhaps for want of memory or of shared "
        "memory (/dev/shm): lower `workers`"
    )


class _Samples(Dataset[Sample | UserError]):
    def __init__(self, subjects: Subjects) -> None:
        self.subjects = subjects

    def __getitem__(self, draw: Draw) -> Sample | UserError:
        try:
            return self.subjects.draw(*draw)
        except UserError as error:
            return error  # raised in a worker, torch would wrap its one line in a traceback


def _collate(samples: list[Sample | UserError]) -> Batch | UserError:
    drawn = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        drawn.append(sample)
    x, labels, masks, present = zip(*drawn, strict=True)
    # In a worker, torch's own stacks straight into shared memory.
    return Batch(default_collate(list(x)), default_collate(list(labels)), list(masks), list(present))
