"""What a reader of a mask should know of it, as sentences: each says what there is, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from app.jobs.record import Job
from models.task import STORED, Task
from models.volume import Grid, Volume

COARSE = 2.0
"""A voxel longer than so many times the model's own, along any axis, hides what the model was trained to see."""
SATURATED = 0.01
"""Share of the nonzero voxels at the largest value. Of an image that was not cut off it is far less."""
LOW_DICE = 0.7


@dataclass(frozen=True)
class Facts:
    """Of an image as it was given."""

    spacing: tuple[float, ...]
    """mm, along the axes of the task's orientation."""
    saturated: float
    """Share of the nonzero voxels that have the largest value of all."""

    @classmethod
    def of(cls, volume: Volume, task: Task) -> Facts:
        """Looks at every voxel, twice."""
        data = volume.data
        top, nonzero = float(data.max()), int(np.count_nonzero(data))
        at_top = int(np.count_nonzero(data == top)) if top else 0
        return cls(_along(task, volume.grid), at_top / max(nonzero, 1))


def cautions(job: Job, task: Task, facts: Mapping[str, Facts], empty: bool) -> Iterator[str]:
    """`facts` by modality, `empty`: whether the mask has no labelled voxel."""
    if empty:
        yield (
            "The mask is empty, which does not show that there is nothing to find: look at the images yourself, and "
            "see that they are what the model is for."
        )
    for name, of in facts.items():
        if any(mine > COARSE * wanted for mine, wanted in zip(of.spacing, task.spacing, strict=True)):
            yield (
                f"{name} has voxels of {_size(of.spacing)} mm, along an axis more than {COARSE:g} times the model's "
                f"{_size(task.spacing)} mm: send a scan of finer resolution if there is one, and do not rely on small "
                "structures in the mask."
            )
        if of.saturated > SATURATED:
            yield (
                f"{name} is saturated, with {of.saturated:.0%} of its nonzero voxels at the largest value: export it "
                "again without cutting off intensities."
            )
    yield from _expectations(job, task)


def _expectations(job: Job, task: Task) -> Iterator[str]:
    """About the region of most classes, the first of such: of smaller ones less is to be expected anyway."""
    region = max(task.regions, key=lambda r: len(r.labels)).name
    dice = job.expected.dice.get(region) if job.expected else None
    given = " + ".join(job.given)
    if job.missing:
        remedy = f"check the mask against the images, or send more of {', '.join(job.missing)}"
    else:
        remedy = "check the mask against the images"
    if dice is None:
        yield f"How well the model finds {region} from {given} was never measured: {remedy}."
    elif dice < LOW_DICE:
        yield f"On its test set the model reached a Dice of only {dice:.2f} for {region} from {given}: {remedy}."


def _along(task: Task, grid: Grid) -> tuple[float, ...]:
    if task.orientation == STORED:
        return grid.zooms
    to_task = ornt_transform(io_orientation(grid.affine), axcodes2ornt(task.orientation))
    return tuple(grid.zooms[axis] for axis in np.argsort(to_task[:, 0]))


def _size(spacing: tuple[float, ...]) -> str:
    return " x ".join(f"{mm:.3g}" for mm in spacing)
