"""`Look`: what kind of scans these are, told from the scans alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from models.raw.coarse import Bool, Coarse
from models.raw.similarity import off_the_best
from models.task import Task
from models.volume import Volume, VolumeError

LOOK_MM = 4.0
"""Voxels of the copies that are looked at: a skull is 5 to 8 mm thick, and a look takes no time."""
LARGEST_BRAIN_ML = 2600
"""Above it, what is bright is a head: brains have 900 to 2000 mL."""
OUTSIDE = 0.05
"""Share of a volume's voxels outside what is bright, from which on they tell whether the air was cut away."""
VALLEY = 0.62
"""A layer under the surface that is darker than this share of what lies over and under it is bone."""
OFF_MM = 1.0
OFF_DEGREES = 1.5
"""How far from the best position two scans may be and still count as aligned."""
PROBE = 3.0
BRIGHT_FLUID, DARK_FLUID = 1.03, 0.97
"""Of a rim over what is under it: in a T2 what is outside, fluid and grey matter, is brighter, in others darker."""
SAME_OUTLINE = 0.9
"""Dice of two brains' outlines below which they are hardly one patient's."""
MOST_LABELS = 12
SAMPLED = 20_000
"""Voxels that are counted first: a scan has more values among them than a mask."""
FEWEST = 200
"""Voxels below which a layer tells nothing."""


def is_brain(task: Task) -> bool:
    """Whether a task is of the brain: only there is fluid attenuated (FLAIR)."""
    return any("flair" in (m.name, *m.aliases) for m in task.modalities)


@dataclass(frozen=True)
class Look:
    """One scan, looked at."""

    coarse: Coarse
    bright: Bool = field(repr=False)
    head: bool
    """Whether there is a skull around the brain."""
    rim: float
    """Grey value of the brain's outer 6 mm over that of the layer under it; NaN for a head."""

    @classmethod
    def at(cls, volume: Volume) -> Look:
        """Look at a scan."""
        coarse = Coarse.of(volume, LOOK_MM)
        bright = coarse.bright()
        depth = ndimage.distance_transform_edt(np.pad(bright, 1), sampling=coarse.zooms)[1:-1, 1:-1, 1:-1]
        head = _air_is_left(coarse, bright) or _has_bone(coarse, bright, depth)
        head = head or float(bright.sum()) * coarse.voxel_ml > LARGEST_BRAIN_ML
        return cls(coarse, bright, head, np.nan if head else _rim(coarse, bright, depth))


def _air_is_left(coarse: Coarse, bright: Bool) -> bool:
    """Whether the voxels outside hold noise: a stripped scan is exactly 0 there."""
    outside = coarse.data[~ndimage.binary_dilation(bright, iterations=2)]
    return outside.size > OUTSIDE * bright.size and float((outside != 0).mean()) > 0.5


def _has_bone(coarse: Coarse, bright: Bool, depth: np.ndarray) -> bool:
    """Whether a dark layer lies between a bright one at the surface and the brain."""
    deep = coarse.data[bright & (depth > 18)]
    if deep.size < FEWEST:
        return False
    inner = float(np.median(deep))
    layers = [coarse.data[bright & (depth > low) & (depth <= low + 3)] for low in range(0, 18, 3)]
    medians = [float(np.median(layer)) if layer.size else 0.0 for layer in layers]
    darks = [float(np.quantile(layer, 0.3)) if layer.size else 0.0 for layer in layers]
    return any(darks[n] < VALLEY * min(max(medians[:n]), inner) for n in range(1, len(layers)) if layers[n].size)


def _rim(coarse: Coarse, bright: Bool, depth: np.ndarray) -> float:
    # Not much deeper, where coils see less: their shading is no contrast.
    rim, deep = coarse.data[bright & (depth <= 6)], coarse.data[bright & (depth > 9) & (depth <= 20)]
    if rim.size < FEWEST or deep.size < FEWEST:
        return float("nan")
    # A high quantile: thick slices mix the outermost voxels with the air.
    return float(np.quantile(rim, 0.75)) / max(float(np.median(deep)), 1e-6)


def aligned(looks: Mapping[str, Look], reference: str) -> bool:
    """Whether all scans lie on the reference where their headers say, to about a millimetre."""
    fixed = looks[reference].coarse
    for name, look in looks.items():
        if name == reference:
            continue
        off = np.abs(off_the_best(fixed, look.coarse, PROBE))
        if off[:3].max() > OFF_MM or off[3:].max() > OFF_DEGREES:
            return False
    return True


def refuse_labels(volumes: Mapping[str, Volume]) -> None:
    """Raises `VolumeError` for a scan that is a mask: few values, all whole numbers."""
    for name, volume in volumes.items():
        step = max(1, round((volume.data.size / SAMPLED) ** (1 / 3)))
        if np.unique(volume.data[::step, ::step, ::step]).size > MOST_LABELS:
            continue
        values = np.unique(volume.data)
        if values.size <= MOST_LABELS and (values == np.rint(values)).all():
            raise VolumeError(
                f"{name}: the image has {values.size} values, all whole numbers: this is a mask, not a scan; give the "
                "scan itself, or leave this modality out"
            )


def doubts(looks: Mapping[str, Look], reference: str) -> list[str]:
    """What a reader of the mask should know of the scans, as sentences."""
    found = []
    for name, look in looks.items():
        rim = look.rim
        if name in {"t1", "t1ce"} and rim > BRIGHT_FLUID:
            found.append(
                f"{name}: fluid and grey matter are brighter than white matter, as in a T2 and in no T1; was another "
                "scan given as it?"
            )
        if name == "t2" and rim < DARK_FLUID:
            found.append(
                "t2: fluid and grey matter are darker than white matter, as in a T1 and in no T2; was another scan "
                "given as it?"
            )
    return found + _strangers(looks, reference)


def _strangers(looks: Mapping[str, Look], reference: str) -> list[str]:
    first = looks[reference]
    if first.head:
        return []
    found = []
    for name, look in looks.items():
        if name == reference or look.head:
            continue
        other = Coarse(look.bright.astype(np.float32), look.coarse.affine)
        seen, there = first.coarse.seen_from(other, np.eye(4))
        one, two = first.bright & there, (seen > 0.5) & there
        dice = 2 * float((one & two).sum()) / max(float(one.sum() + two.sum()), 1.0)
        if dice < SAME_OUTLINE:
            found.append(
                f"{name}: the brain's outline is not that of {reference} (Dice {dice:.2f}); is it a scan of the same "
                "patient, registered to the others?"
            )
    return found
