"""`Windows`: the overlapping windows that cover a box, and the mean of what is found in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import TypeAlias

import torch
from torch import Tensor

from models.lanes import in_lanes

Place: TypeAlias = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Windows:
    """Windows of one size that cover a box, the last of each axis flush with its end.

    Raises ValueError if the box is smaller than a window, or the overlap is not in [0, 1).
    """

    shape: tuple[int, int, int]
    """Voxels of the box along each axis."""
    size: tuple[int, int, int]
    """Voxels of a window."""
    overlap: float
    """Share of a window, along each axis, that the next one covers again."""

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise ValueError(f"an overlap of {self.overlap:g} is not in [0, 1)")
        if any(n < w for n, w in zip(self.shape, self.size, strict=True)):
            raise ValueError(f"a box of {self.shape} voxels is smaller than a window of {self.size}")

    def __len__(self) -> int:
        return prod(len(starts) for starts in self._starts())

    def __iter__(self) -> Iterator[Place]:
        for corner in itertools.product(*self._starts()):
            i, j, k = (slice(start, start + w) for start, w in zip(corner, self.size, strict=True))
            yield i, j, k

    def mean(
        self,
        found: Callable[[Tensor], Tensor],
        x: Tensor,
        classes: int,
        *,
        batch: int = 1,
        lanes: int = 1,
        on_fraction: Callable[[float], None] = lambda _fraction: None,
    ) -> Tensor:
        """The mean of `found` over the windows, every window weighing the same: (C, X, Y, Z) float32.

        x (P, X, Y, Z); `found` takes up to `batch` windows (B, P, *size) and gives (B, C, *size). It runs in `lanes`
        threads; their number does not change the sums. `on_fraction` hears how much is done, and may raise to stop.
        """
        total, done = torch.zeros(classes, *self.shape, device=x.device), 0

        def found_in(places: Sequence[Place]) -> tuple[Sequence[Place], Tensor]:
            return places, found(torch.stack([x[(slice(None), *place)] for place in places]))

        on_fraction(0.0)
        for places, of_windows in in_lanes(found_in, self._batches(batch), lanes):
            for place, of_window in zip(places, of_windows, strict=True):
                total[(slice(None), *place)] += of_window
            done += len(places)
            on_fraction(done / len(self))
        i, j, k = (torch.tensor(times, device=x.device) for times in self._times())
        for plane, times in zip(total.unbind(1), i, strict=True):
            plane.div_(times * j[:, None] * k)
        return total

    def _batches(self, most: int) -> Iterator[Sequence[Place]]:
        places = iter(self)
        while some := list(itertools.islice(places, most)):
            yield some

    def _starts(self) -> list[list[int]]:
        """Per axis."""
        return [
            [min(n * step, size - w) for n in range(ceil((size - w) / step) + 1)]
            for size, w, step in zip(self.shape, self.size, self._steps(), strict=True)
        ]

    def _steps(self) -> list[int]:
        return [max(int(w * (1 - self.overlap)), 1) for w in self.size]

    def _times(self) -> list[list[int]]:
        """Per axis and voxel: how many windows of that axis cover it."""
        return [
            [sum(start <= voxel < start + w for start in starts) for voxel in range(size)]
            for size, w, starts in zip(self.shape, self.size, self._starts(), strict=True)
        ]
