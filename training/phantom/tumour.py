"""`Tumour`: where core, rim and oedema of one phantom lie, as level functions on a 2 mm plan of the patient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from training.phantom.anatomy import Anatomy, load_anatomy
from training.phantom.fields import SmoothField
from training.phantom.pose import Axes, Pose, Swelling

Floats = npt.NDArray[np.float32]

PLAN_MM = 2.0
"""mm: voxel of the plan. Boundaries are smooth functions, interpolated to the grid the images have."""

_NO_RIM = 0.15  # share of patients whose tumour does not enhance
# How fast oedema advances through CSF, grey and white matter, relative to white matter.
_SPEED = np.array([0.02, 0.28, 1.0], np.float32)
_FAR = np.float32(1e6)


@dataclass(frozen=True)
class Tumour:
    """Level functions in mm on the plan's grid, negative inside, and how the tumour pushes its surroundings."""

    axes: Axes
    core: Floats
    necrosis: Floats
    """Negative where the core does not enhance."""
    oedema: Floats
    """Negative within the whole tumour's outline, core included."""
    swelling: Swelling
    enhancing: bool

    def levels(self, positions: Floats) -> Floats:
        """Core, necrosis and oedema levels (3, N) at patient positions (3, N) in mm; far outside off the plan."""
        index = np.stack([(p - a[0]) / np.float32(PLAN_MM) for p, a in zip(positions, self.axes, strict=True)])
        return np.stack(
            [
                ndimage.map_coordinates(level, index, order=1, mode="nearest", output=np.float32)
                for level in (self.core, self.necrosis, self.oedema)
            ]
        )


def grow_tumour(rng: np.random.Generator, pose: Pose, low: Floats, high: Floats) -> Tumour:
    """A tumour in or near the white matter of the patient whose brain lies between `low` and `high` (mm)."""
    anatomy = load_anatomy(PLAN_MM)
    volume = 1000 * float(np.clip(rng.lognormal(math.log(62), 0.62), 5, 190))
    core_volume = volume * float(np.clip(rng.lognormal(math.log(0.34), 0.4), 0.12, 0.75))
    enhancing = bool(rng.random() >= _NO_RIM)
    radius = (core_volume * 3 / (4 * math.pi)) ** (1 / 3)

    seat = _seat(rng, pose, anatomy, low, high)
    swelling = Swelling(seat, push=float(rng.uniform(0.12, 0.38)), reach=1.15 * radius)
    half = 2.0 * (volume * 3 / (4 * math.pi)) ** (1 / 3) + 16
    axes = _axes(np.maximum(seat - half, low), np.minimum(seat + half, high))
    tissues, brain = _surroundings(pose, anatomy, axes, swelling)

    core = _core(rng, axes, seat, radius, tissues)
    core[~brain] = _FAR
    core -= _threshold(core, core_volume)
    if enhancing:
        thickness = rng.uniform(2.2, 5.0) * np.exp(0.35 * SmoothField(rng, max(radius / 2, 4)).on(*axes))
        # A solid nodule keeps part of the core from dying even where it is thick.
        nodule = SmoothField(rng, max(radius / 1.5, 5)).on(*axes) - rng.uniform(0.5, 2.0)
        necrosis = np.maximum(core + thickness, 4 * nodule)
    else:
        necrosis = core
    arrival = _arrival(core, tissues, brain, np.exp(0.3 * SmoothField(rng, 9.0).on(*axes)))
    oedema = arrival - _threshold(arrival, volume)
    oedema = ndimage.gaussian_filter(np.clip(oedema, -60, 20), 0.6)
    return Tumour(axes, core, necrosis.astype(np.float32), np.minimum(oedema, core), swelling, enhancing)


def _axes(low: Floats, high: Floats) -> Axes:
    x, y, z = (np.arange(a, b + PLAN_MM, PLAN_MM, dtype=np.float32) for a, b in zip(low, high, strict=True))
    return x, y, z


def _seat(rng: np.random.Generator, pose: Pose, anatomy: Anatomy, low: Floats, high: Floats) -> Floats:
    """The centre, in patient mm: deep in the cerebral white matter, or at its border with the cortex."""
    axes = _axes(low, high)
    template = pose.to_template(axes)
    white = anatomy.tissues(template.reshape(3, -1))[2].reshape(template.shape[1:])
    depth = ndimage.distance_transform_edt(anatomy.sample(anatomy.brain, template) > 0.5, sampling=PLAN_MM)
    x, y, z = template
    cerebrum = (z > -22) & ~((y < -38) & (z < -8)) & ~((np.abs(x) < 16) & (z < -6))
    weight = np.where(cerebrum & (depth > 9) & (white > 0.35), white, 0).astype(np.float64).ravel()
    place = int(np.searchsorted(np.cumsum(weight), rng.random() * weight.sum(), side="right"))
    index = np.unravel_index(place, white.shape)
    return np.array([a[i] for a, i in zip(axes, index, strict=True)], np.float32)


def _surroundings(pose: Pose, anatomy: Anatomy, axes: Axes, swelling: Swelling) -> tuple[Floats, npt.NDArray[np.bool_]]:
    template = pose.to_template(axes)
    shape = template.shape[1:]
    brain = anatomy.sample(anatomy.brain, template) > 0.5
    here = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)
    pushed = pose.swell(template.reshape(3, -1), here, swelling)
    return anatomy.tissues(pushed).reshape(3, *shape), brain


def _core(rng: np.random.Generator, axes: Axes, seat: Floats, radius: float, tissues: Floats) -> Floats:
    """mm-like distance from one to three overlapping ellipsoids, roughened at two scales and kept off the CSF."""
    here = np.stack(np.meshgrid(*axes, indexing="ij"))
    level = np.full(here.shape[1:], _FAR, np.float32)
    for lobe in range(int(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))):
        centre = seat + (rng.normal(0, 0.55 * radius, 3) if lobe else 0)
        stretch = np.exp(rng.normal(0, 0.22, 3))
        stretch /= stretch.prod() ** (1 / 3)
        turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        offset = here - centre.astype(np.float32).reshape(3, 1, 1, 1)
        square = np.zeros_like(level)
        for row in (turn / stretch[:, None]).astype(np.float32):
            square += (row[0] * offset[0] + row[1] * offset[1] + row[2] * offset[2]) ** 2
        level = np.minimum(level, np.sqrt(square) * np.float32(1 if lobe == 0 else rng.uniform(1.1, 1.6)))
    level += np.float32(0.20 * radius) * SmoothField(rng, max(0.75 * radius, 5)).on(*axes)
    level += np.float32(0.07 * radius + 0.3) * SmoothField(rng, 5.0).on(*axes)
    level += np.float32(0.8 * radius) * ndimage.gaussian_filter(tissues[0], 0.7)
    return level


def _threshold(level: Floats, volume: float) -> np.float32:
    """The level whose inside holds `volume` mm3 (or nearly all the plan has)."""
    count = min(max(int(volume / PLAN_MM**3), 1), int((level < _FAR / 2).sum()) - 1)
    return np.float32(np.partition(level.ravel(), count)[count])


def _arrival(core: Floats, tissues: Floats, brain: npt.NDArray[np.bool_], roughness: Floats) -> Floats:
    """Geodesic distance from the core (mm of white matter): shortest paths over 26 neighbours, slow in grey matter.

    Inside the core: the core's own (negative) level, so that one threshold serves both.
    """
    speed = _SPEED[0] * tissues[0] + _SPEED[1] * tissues[1] + _SPEED[2] * tissues[2]
    cost = np.pad(np.where(brain, roughness / np.maximum(speed, 0.02), _FAR), 1, constant_values=_FAR)
    time = np.pad(np.where(core < 0, 0, _FAR), 1, constant_values=_FAR).astype(np.float32)
    cost = cost.astype(np.float32)
    steps = [(s, PLAN_MM * math.sqrt(sum(map(abs, s)))) for s in product((-1, 0, 1), repeat=3) if any(s)]
    inner = (slice(1, -1),) * 3
    half_cost = {length: cost * np.float32(length / 2) for length in {length for _, length in steps}}
    for _ in range(200):
        before = time[inner].copy()
        best = time[inner].copy()
        for step, length in steps:
            there = tuple(slice(1 + s, n - 1 + s) for s, n in zip(step, time.shape, strict=True))
            half = half_cost[length]
            np.minimum(best, time[there] + half[there] + half[inner], out=best)
        time[inner] = best
        if np.array_equal(before, best):
            break
    return np.where(core < 0, core, time[inner])
