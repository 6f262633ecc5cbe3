"""The input contract: any patient's volumes to what a network sees, and its answer back to the patient's own grid.

One working grid per patient: the task's orientation and spacing, along the first given volume's own axes (an oblique
scan stays oblique). Volumes on that volume's grid at the task's spacing are only flipped and permuted, which is exact;
others are resampled linearly. Then everything is cropped to the brain. Training (`passion prepare`) and serving both
come through here, so a network is served what it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from nibabel.processing import resample_from_to

from models.task import STORED, Task
from models.volume import Affine, Grid, Volume, VolumeError

Float = npt.NDArray[np.float32]
Classes = npt.NDArray[np.uint8]
Value = TypeVar("Value", bound=np.generic)

SPACING_TOLERANCE = 0.01
"""A spacing within 1 % of the task's is taken as the task's: resampling would blur more than it mends."""

HALF = 0.5 + 1e-3
"""Voxels from a voxel's centre to its face, and a thousandth for rounding."""

MAX_WORKING_VOXELS = 2**27
"""512^3: beyond it a header's wrong voxel size would take all memory."""


@dataclass(frozen=True)
class WorkingGrid:
    """The reference volume's grid, reoriented to the task's axis codes and, where needed, at the task's spacing."""

    reference: Grid
    to_working: npt.NDArray[np.float64]
    """nibabel orientation transform from the reference's axes."""
    shape: tuple[int, int, int]
    affine: Affine
    resampled: bool

    @classmethod
    def of(cls, reference: Grid, task: Task) -> WorkingGrid:
        """Raises `VolumeError` for an affine without a clear orientation, or a field of view beyond reason."""
        start = io_orientation(reference.affine)
        if np.isnan(start).any():
            raise VolumeError("the image's axes have no clear orientation: its affine is damaged")
        wanted_axes = start if task.orientation == STORED else axcodes2ornt(task.orientation)
        transform = ornt_transform(start, wanted_axes)
        affine = reference.affine @ inv_ornt_aff(transform, reference.shape)
        order = np.argsort(transform[:, 0])
        shape = np.array(reference.shape)[order]
        zooms = np.array(nib.affines.voxel_sizes(affine))
        wanted = np.array(task.spacing)
        if (np.abs(zooms - wanted) <= SPACING_TOLERANCE * wanted).all():
            return cls(reference, transform, _triple(shape), affine, resampled=False)
        scale = wanted / zooms
        resampled_shape = np.maximum(np.ceil(shape / scale - 1e-6), 1).astype(int)
        if np.prod(resampled_shape, dtype=float) > MAX_WORKING_VOXELS:
            extent = " x ".join(f"{n * z:.0f}" for n, z in zip(shape, zooms, strict=True))
            raise VolumeError(
                f"the image spans {extent} mm, too much for a grid of {' x '.join(f'{s:g}' for s in wanted)} mm: "
                "check the voxel size in its header, or crop it to the head"
            )
        # Both grids fill the same field of view: its corner, not the first voxel's centre, is what they share.
        step = np.diag([*scale, 1.0])
        step[:3, 3] = (scale - 1) / 2
        return cls(reference, transform, _triple(resampled_shape), affine @ step, resampled=True)

    def bring(self, volume: Volume) -> Float:
        """The volume's voxels on this grid, (X, Y, Z) float32."""
        if volume.grid.same_as(self.reference) and not self.resampled:
            return np.ascontiguousarray(apply_orientation(volume.data, self.to_working))
        return self._resample(volume.data, volume.grid.affine)

    def bring_classes(self, classes: Classes, grid: Grid, count: int) -> Classes:
        """Class indices on `grid` to this grid: the class with the largest linearly resampled share."""
        if grid.same_as(self.reference) and not self.resampled:
            return np.ascontiguousarray(apply_orientation(classes, self.to_working))
        shares = [self._resample((classes == c).astype(np.float32), grid.affine) for c in range(1, count)]
        background = 1 - np.sum(shares, axis=0)
        return np.asarray(np.argmax(np.stack([background, *shares]), axis=0), np.uint8)

    def _resample(self, data: Float, affine: Affine) -> Float:
        """Linear, 0 outside the source's field of view. A voxel fills its extent: half a slice of 20 mm is not lost."""
        image = nib.Nifti1Image(data, affine)
        brought = resample_from_to(image, (self.shape, self.affine), order=1, mode="nearest")
        resampled = np.array(brought.dataobj, np.float32)
        _clear_beyond(resampled, np.linalg.inv(affine) @ self.affine, data.shape)
        return resampled


@dataclass(frozen=True)
class Box:
    """A box of the working grid; it may reach outside, where volumes are 0."""

    start: tuple[int, int, int]
    stop: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels per axis."""
        return _triple(np.subtract(self.stop, self.start))

    def cut(self, data: npt.NDArray[Value]) -> npt.NDArray[Value]:
        """The box's voxels, 0 outside `data`."""
        inside, place = self._overlap(data.shape)
        if inside == place and self.shape == data[inside].shape:
            return np.ascontiguousarray(data[inside])
        cut = np.zeros(self.shape, data.dtype)
        cut[place] = data[inside]
        return cut

    def paste(self, box: npt.NDArray[Value], shape: tuple[int, int, int]) -> npt.NDArray[Value]:
        """The inverse of `cut`: a volume of `shape`, 0 outside the box."""
        inside, place = self._overlap(shape)
        whole = np.zeros(shape, box.dtype)
        whole[inside] = box[place]
        return whole

    def _overlap(self, shape: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        low = np.maximum(self.start, 0)
        high = np.minimum(self.stop, shape)
        inside = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        place = tuple(slice(int(a - s), int(b - s)) for a, b, s in zip(low, high, self.start, strict=True))
        return inside, place


@dataclass(frozen=True)
class Intake:
    """A patient's volumes on one grid, cropped to the brain, not normalised."""

    arrays: dict[str, Float]
    """By modality, each (X, Y, Z) of the box."""
    box: Box
    working: WorkingGrid

    def restore(self, probabilities: Float, onto: Grid | None = None) -> Classes:
        """Class probabilities (C, X, Y, Z) of the box -> class indices on the reference volume's own grid, or `onto`
        another one in the same world; background where the box does not reach.

        Without resampling this is the exact inverse of the way in; else probabilities are resampled linearly and the
        largest wins, which is smoother than resampling labels.
        """
        reference = self.working.reference if onto is None else onto
        if not self.working.resampled and reference.same_as(self.working.reference):
            return self.restore_classes(largest(probabilities))
        classes = np.zeros(reference.shape, np.uint8)
        place, bring = self._way_back(reference)
        part = np.zeros(classes[place].shape, np.uint8)
        best = np.full(part.shape, -np.inf, np.float32)
        for index, probability in enumerate(probabilities):
            resampled = bring(probability)
            better = resampled > best
            best[better] = resampled[better]
            part[better] = index
        classes[place] = part
        return classes

    def restore_region(self, probabilities: Float, labels: Sequence[int], onto: Grid | None = None) -> Float:
        """Class probabilities (C, X, Y, Z) of the box -> the probability of any of some classes, by index, on the
        reference volume's own grid or `onto` another; 0 outside the box; as exact as `restore`."""
        reference = self.working.reference if onto is None else onto
        first, *others = labels
        region = probabilities[first].copy()
        for index in others:
            region += probabilities[index]
        np.clip(region, 0, 1, out=region)  # the sum's rounding
        if not self.working.resampled and reference.same_as(self.working.reference):
            return self._replaced(region)
        whole = np.zeros(reference.shape, np.float32)
        place, bring = self._way_back(reference)
        whole[place] = bring(region)
        return whole

    def without_images(self) -> Intake:
        """What the way back needs, and no voxels."""
        return replace(self, arrays={})

    def _way_back(self, reference: Grid) -> tuple[tuple[slice, ...], Callable[[Float], Float]]:
        """The part of a grid that the box reaches, and what resamples a volume of the box to it, 0 beyond the box."""
        box_affine = self.working.affine @ nib.affines.from_matvec(np.eye(3), self.box.start)
        to_reference = np.linalg.inv(reference.affine) @ box_affine
        corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in self.box.shape])).reshape(3, -1)
        reached = nib.affines.apply_affine(to_reference, corners.T)
        low = np.clip(np.ceil(reached.min(0) - 1e-6), 0, reference.shape).astype(int)
        high = np.clip(np.floor(reached.max(0) + 1e-6) + 1, low, reference.shape).astype(int)
        part_affine = reference.affine @ nib.affines.from_matvec(np.eye(3), low)
        target = (_triple(high - low), part_affine)

        def bring(values: Float) -> Float:
            image = nib.Nifti1Image(values, box_affine)
            resampled = np.array(resample_from_to(image, target, order=1, mode="nearest").dataobj, np.float32)
            _clear_beyond(resampled, np.linalg.inv(box_affine) @ part_affine, self.box.shape)
            return resampled

        return tuple(slice(a, b) for a, b in zip(low, high, strict=True)), bring

    def restore_classes(self, classes: Classes) -> Classes:
        """Class indices (X, Y, Z) of the box -> the reference volume's grid, exactly; for grids not resampled."""
        return self._replaced(classes)

    def _replaced(self, box: npt.NDArray[Value]) -> npt.NDArray[Value]:
        back = ornt_transform(io_orientation(self.working.affine), io_orientation(self.working.reference.affine))
        whole = self.box.paste(box, self.working.shape)
        return np.ascontiguousarray(apply_orientation(whole, back))


def take_in(volumes: Mapping[str, Volume], task: Task, least: tuple[int, int, int] | None = None) -> Intake:
    """Bring volumes, keyed by canonical modality in the order given, to one grid and crop to the brain.

    The first volume is the reference. The box has at least `least` voxels along each axis, by default a patch's. Raises
    `VolumeError` naming the modality that is empty or lies elsewhere.
    """
    reference = next(iter(volumes.values())).grid
    working = WorkingGrid.of(reference, task)
    arrays = {}
    for name, volume in volumes.items():
        if not volume.data.any():
            raise VolumeError(f"{name}: every voxel is 0; leave an empty scan out")
        arrays[name] = working.bring(volume)
        if not arrays[name].any():
            raise VolumeError(
                f"{name}: does not lie where {next(iter(volumes))} lies; give scans of one patient, registered"
            )
    box = brain_box(arrays, task, least)
    return Intake({name: box.cut(array) for name, array in arrays.items()}, box, working)


def brain_box(arrays: Mapping[str, Float], task: Task, least: tuple[int, int, int] | None = None) -> Box:
    """The box of voxels nonzero in any modality, grown to `min_crop` where the volume allows, at least `least` (by
    default a patch)."""
    least = task.patch_size if least is None else least
    nonzero = np.logical_or.reduce([array != 0 for array in arrays.values()])
    start, stop = [], []
    for axis, size in enumerate(nonzero.shape):
        others = tuple(a for a in range(3) if a != axis)
        found = np.flatnonzero(nonzero.any(axis=others))
        low, high = int(found[0]), int(found[-1]) + 1
        low, high = _grow(low, high, min(task.min_crop, size))
        shift = min(max(-low, 0), max(size - high, 0)) if low < 0 else -min(max(high - size, 0), low)
        low, high = _grow(low + shift, high + shift, least[axis])
        start.append(low)
        stop.append(high)
    return Box(_triple(np.array(start)), _triple(np.array(stop)))


def statistics(arrays: Mapping[str, Float]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation per modality over voxels where the sum over the modalities is positive."""
    first, *others = arrays.values()
    total = first.copy()
    for array in others:
        total += array
    brain = total > 0
    found = {}
    for name, array in arrays.items():
        values = array[brain].astype(np.float64)
        std = float(values.std()) if values.size else 0.0
        if std == 0:
            raise VolumeError(f"{name}: has no contrast inside the brain (all voxels alike); leave it out")
        found[name] = (float(values.mean()), std)
    return found


def normalise(arrays: Mapping[str, Float]) -> dict[str, Float]:
    """Subtract the mean and divide by the standard deviation of `statistics`. Background voxels move along."""
    found = statistics(arrays)
    return {name: (array - np.float32(found[name][0])) / np.float32(found[name][1]) for name, array in arrays.items()}


def normalised(arrays: Mapping[str, Float], names: Sequence[str]) -> Float:
    """What `normalise` gives for `names`, in that order, as one array (P, X, Y, Z): no volume is there twice."""
    found = statistics(arrays)
    stacked = np.empty((len(names), *arrays[names[0]].shape), np.float32)
    for name, place in zip(names, stacked, strict=True):
        mean, std = found[name]
        np.subtract(arrays[name], np.float32(mean), out=place)
        np.divide(place, np.float32(std), out=place)
    return stacked


def largest(probabilities: Float) -> Classes:
    """The class with the largest of probabilities (C, X, Y, Z), the first of equals, plane by plane: `argmax` would
    make an index of eight bytes for every voxel first."""
    classes = np.zeros(probabilities.shape[1:], np.uint8)
    for plane, of_plane in zip(classes, probabilities.swapaxes(0, 1), strict=True):
        best = of_plane[0].copy()
        for index, probability in enumerate(of_plane[1:], 1):
            better = probability > best
            plane[better] = index
            np.copyto(best, probability, where=better)
    return classes


def _clear_beyond(data: npt.NDArray[Value], to_source: Affine, source: tuple[int, ...]) -> None:
    """Set to 0 the voxels whose centres lie outside a field of view of `source` voxels; `to_source` takes indices to
    its indices."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in data.shape])).reshape(3, -1).T
    reached = nib.affines.apply_affine(to_source, corners)
    for axis, size in enumerate(source):
        if reached[:, axis].min() < -HALF or reached[:, axis].max() > size - 1 + HALF:
            i, j, k = np.ogrid[tuple(slice(n) for n in data.shape)]
            a, b, c, offset = to_source[axis]
            place = a * i + b * j + c * k + offset
            data[(place < -HALF) | (place > size - 1 + HALF)] = 0


def _grow(low: int, high: int, least: int) -> tuple[int, int]:
    missing = max(least - (high - low), 0)
    return low - missing // 2, high + missing - missing // 2


def _triple(values: npt.NDArray[np.integer]) -> tuple[int, int, int]:
    x, y, z = (int(v) for v in values)
    return x, y, z
