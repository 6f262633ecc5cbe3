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

Mask = tuple[bool, ...]


@dataclass(frozen=True)
class Batch:
    """A training batch."""

    x: Tensor
    """(B, K, D, H, W) float32; channels of missing modalities are 0."""
    labels: Tensor
    """(B, D, H, W) class indices, uint8."""
    masks: list[Mask]


@dataclass(frozen=True)
class Subjects:
    """The training subjects, what each one has, and how crops are drawn from them."""

    cases: list[PreparedCase]
    masks: list[Mask]
    task: Task
    seed: int
    foreground: float = 0.0

    def order(self, epoch: int) -> list[int]:
        """Every subject once, shuffled by seed and epoch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.cases))
        return [int(i) for i in order]

    def draw(self, index: int, epoch: int) -> tuple[Tensor, Tensor, Mask]:
        """An augmented crop of one subject: images (K, D, H, W), class indices (D, H, W), mask."""
        case, mask, size = self.cases[index], self.masks[index], self.task.patch_size
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
        there = [name for name, has in zip(self.task.names, mask, strict=True) if has]
        images = []
        for name in there:
            mean, std = case.statistics(name)
            images.append((box.cut(case.image(name)) - np.float32(mean)) / np.float32(std))
        cropped = np.asarray(box.cut(labels), np.uint8)
        augmented, cropped = augment(np.stack(images).astype(np.float32), cropped, rng)
        x = np.zeros((len(mask), *size), np.float32)
        x[list(mask)] = augmented
        return torch.from_numpy(x), torch.from_numpy(cropped), mask


class _Epoch(Dataset[tuple[Tensor, Tensor, Mask]]):
    def __init__(self, subjects: Subjects, epoch: int, order: list[int]) -> None:
        self.subjects, self.epoch, self.order = subjects, epoch, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Mask]:
        return self.subjects.draw(self.order[position], self.epoch)


def batches(subjects: Subjects, epoch: int, batch_size: int, workers: int, skip: int = 0) -> Iterator[Batch]:
    """The batches of an epoch, from number `skip` on."""
    order = subjects.order(epoch)[skip * batch_size :]
    yield from DataLoader(
        _Epoch(subjects, epoch, order),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        # Its own, or the loader draws from the generator that dropout uses, and a resumed run would differ.
        generator=torch.Generator(),
    )


def _collate(samples: list[tuple[Tensor, Tensor, Mask]]) -> Batch:
    return Batch(torch.stack([s[0] for s in samples]), torch.stack([s[1] for s in samples]), [s[2] for s in samples])
