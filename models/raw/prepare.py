"""`prepare`: what is done with a patient's scans before the input contract takes them in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from models.raw.look import Look, aligned, doubts, is_brain, refuse_labels
from models.task import Task, TaskError
from models.volume import Grid, Volume

MODES = ("auto", "none", "raw")
AUTO, NONE, RAW = MODES
Report = Callable[[str, float], None]
STAGE = "preparing"


@dataclass(frozen=True)
class Prepared:
    """Scans that the input contract can take in."""

    volumes: dict[str, Volume]
    """By canonical modality, the reference first. Each grid is where the scan lies in the reference's world."""
    warnings: tuple[str, ...] = ()
    """What a reader of the mask should know, as sentences."""


def prepare(volumes: Mapping[str, Volume], task: Task, mode: str, report: Report) -> Prepared:
    """`none`: the scans as they are. `raw`: registered to the finest of them, the skull stripped where there is one.
    `auto`: `none` where they are aligned and stripped already, and else what is needed of `raw`.

    Registered scans are not resampled here: their grids are corrected, and the one resampling is the input contract's.
    Raises `TaskError` for another mode or a task that is not of the brain, and `VolumeError` naming the modality.
    """
    if mode not in MODES:
        raise TaskError(f"preprocess {mode!r} is none of {', '.join(MODES)}")
    given = dict(volumes)
    if not is_brain(task):
        if mode == RAW:
            raise TaskError(f"preprocess raw is for scans of the head, and task {task.name} is not of the brain")
        return Prepared(given)
    refuse_labels(given)
    looks = {name: Look.at(volume) for name, volume in given.items()}
    reference = finest(given, task)
    heads = [name for name, look in looks.items() if look.head]
    if mode == NONE or (mode == AUTO and not heads and (_one_grid(given) or aligned(looks, reference))):
        return Prepared(given, (*_with_skull(heads), *doubts(looks, next(iter(given)))))
    return _from_the_scanner(given, reference, heads, report)


def finest(volumes: Mapping[str, Volume], task: Task) -> str:
    """The modality with the smallest voxels, the first in the task's order among equals."""
    return min(volumes, key=lambda name: (round(volumes[name].grid.voxel_ml, 6), task.names.index(name)))


def _one_grid(volumes: Mapping[str, Volume]) -> bool:
    first, *others = (volume.grid for volume in volumes.values())
    return all(other.same_as(first) for other in others)


def _with_skull(heads: list[str]) -> list[str]:
    if not heads:
        return []
    return [
        f"{', '.join(heads)}: the skull seems to be there, and the model was trained on stripped scans; strip it, or "
        "use preprocess raw"
    ]


def _from_the_scanner(volumes: dict[str, Volume], reference: str, heads: list[str], report: Report) -> Prepared:
    report(STAGE, 0.0)
    placed, moved = _registered(volumes, reference, report)
    told = []
    if moved:
        told.append(f"The scans were registered to {reference}: {', '.join(moved)}.")
    if heads:
        placed, told_of = _stripped(placed, heads, report)
        told.append(told_of)
    looks = {name: Look.at(volume) for name, volume in placed.items()}
    report(STAGE, 1.0)
    return Prepared(placed, (*told, *doubts(looks, reference)))


def _registered(volumes: dict[str, Volume], reference: str, report: Report) -> tuple[dict[str, Volume], list[str]]:
    fixed = volumes[reference]
    placed, moved = {reference: fixed}, []
    others = [name for name in volumes if name != reference]
    for done, name in enumerate(others):
        from models.raw.registration import register

        volume = volumes[name]
        found = register(fixed, volume, name, reference)
        placed[name] = replace(volume, grid=replace(volume.grid, affine=found.placed(volume.grid.affine)))
        moved.append(f"{name} by {found.shift_mm:.1f} mm and {found.degrees:.1f} degrees")
        report(STAGE, (done + 1) / (len(others) + 2))
    return placed, moved


def _stripped(volumes: dict[str, Volume], heads: list[str], report: Report) -> tuple[dict[str, Volume], str]:
    """Every scan without what lies outside the brain, found in the contrast that shows it best."""
    from models.raw.bias import corrected
    from models.raw.skull import ORDER, brain_of, brought

    best = min(heads, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    brain = brain_of(best, volumes[best])
    report(STAGE, 0.8)
    grid: Grid = volumes[best].grid
    found = {}
    for name, volume in volumes.items():
        there = brain if name == best else brought(brain, grid, volume.grid)
        cut = replace(volume, data=np.where(there, volume.data, np.float32(0)))
        found[name] = corrected(cut, there)
    return found, f"The skull was stripped, with the brain found in {best}: look at the mask upon the scans."
