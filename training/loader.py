"""The loader: crops of prepared cases, the same for the same seed and epoch whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.intake import Box
from models.task import Task
from training.augment import augment, crop_start
from training.cases import PreparedCase
from training.config import Regime

Mask = tuple[bool, ...]
Sample = tuple[Tensor, Tensor, Mask, Mask]


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
        labels = case.labels()
        centre = None
        if rng.random() < self.foreground:
            places = np.argwhere(labels)
            if len(places):
                centre = places[rng.integers(len(places))]
        start = crop_start(case.shape, size, rng, centre)
        box = Box(
            (start[0], start[1], start[2]), (start[0] + size[0], start[1] + size[1], start[2] + size[2])
        )  # reaches outside, into 0, where the case is smaller than a crop
        there = [name for name, has in zip(self.task.names, present, strict=True) if has]
        images = []
        for name in there:
            mean, std = case.statistics(name)
            images.append((box.cut(case.image(name)) - np.float32(mean)) / np.float32(std))
        cropped = np.asarray(box.cut(labels), np.uint8)
        augmented, cropped = augment(np.stack(images).astype(np.float32), cropped, rng)
        x = np.zeros((len(present), *size), np.float32)
        x[list(present)] = augmented
        return torch.from_numpy(x), torch.from_numpy(cropped), mask, present


class _Epoch(Dataset[Sample]):
    def __init__(self, subjects: Subjects, epoch: int, order: list[int]) -> None:
        self.subjects, self.epoch, self.order = subjects, epoch, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Sample:
        return self.subjects.draw(self.order[position], self.epoch)


def batches(
    subjects: Subjects,
    epoch: int,
    batch_size: int,
    workers: int,
    skip: int = 0,
    order: list[int] | None = None,
) -> Iterator[Batch]:
    """The batches of an epoch, from number `skip` on; of the subjects in `order` where they are but a rank's share."""
    order = (subjects.order(epoch) if order is None else order)[skip * batch_size :]
    yield from DataLoader(
        _Epoch(subjects, epoch, order),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        # Its own, or the loader draws from the generator that dropout uses, and a resumed run would differ.
        generator=torch.Generator(),
    )


def _collate(samples: list[Sample]) -> Batch:
    x, labels, masks, present = zip(*samples, strict=True)
    return Batch(torch.stack(x), torch.stack(labels), list(masks), list(present))
