"""`Predictor`: a patient's files in, a mask on the first file's own grid out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nibabel.nifti1 import Nifti1Extension
from torch import Tensor

from models.backbone import Mask
from models.backbones import BACKBONES
from models.card import Card
from models.checkpoint import Checkpoint
from models.heap import kept_heap
from models.intake import Intake, normalised, take_in
from models.layout import in_fast_layout
from models.precision import PrecisionError, arithmetic, check_precision, single
from models.raw.prepare import NONE, prepare
from models.task import Task, TaskError
from models.volume import Grid, Volume, VolumeError, save_image
from models.windows import Windows

OVERLAP = 0.5
"""Share of a window that the next one covers again, along each axis, as published."""
FAST_OVERLAP = 0.25
"""Half of the time; what it costs stands in docs/performance.md."""
MOST_OVERLAP = 0.9
MOST_AT_A_TIME = 16
"""Windows per forward pass of a GPU: more fill it no better."""
MOST_LANES = 4
"""Windows side by side on a CPU; each takes some 300 MB."""
Progress = Callable[[str, float], None]
OnVolume = Callable[[str, Volume], None]


@dataclass(frozen=True)
class RegionProbabilities:
    """How probable each region is, brought to the patient's own grid one region at a time."""

    of_classes: npt.NDArray[np.float32]
    """(C, X, Y, Z) of the intake's box."""
    intake: Intake
    """Without its images."""
    onto: Grid
    """The mask's, where its image lay when the network saw it."""
    grid: Grid
    """The mask's."""
    task: Task

    def of(self, region: str) -> npt.NDArray[np.float32]:
        """(X, Y, Z) on the mask's grid, 0 to 1: the sum over the region's classes. KeyError for a name
        that is none of the task's."""
        labels = {r.name: r.labels for r in self.task.regions}[region]
        return self.intake.restore_region(self.of_classes, labels, self.onto)

    def save(self, region: str, path: Path) -> None:
        """Write a region (.nii or .nii.gz), whole or not at all: uint8, of which `scl_slope` makes 0 to 1 in steps of
        1/255; NIfTI has no float16, and float32 would be four times as large."""
        image = self.grid.image(np.rint(self.of(region) * 255).astype(np.uint8))
        image.header.set_slope_inter(1 / 255, 0)
        image.header.set_intent("estimate", name=region[:16], allow_unknown=False)
        image.header["cal_max"] = 1
        save_image(image, path)


@dataclass(frozen=True)
class Segmentation:
    """A mask on the patient's own grid."""

    classes: npt.NDArray[np.uint8]
    """(X, Y, Z) class indices on `grid`: the first given volume's, or that of the one that was asked for."""
    grid: Grid
    task: Task
    warnings: tuple[str, ...] = ()
    """What a reader of the mask should know of the scans and of what was done with them, as sentences."""
    probabilities: RegionProbabilities | None = None
    """If they were asked for."""

    @property
    def volumes_ml(self) -> dict[str, float]:
        """Volume of every region, mL."""
        counts = np.bincount(self.classes.ravel(), minlength=len(self.task.labels))
        voxel = self.grid.voxel_ml
        return {r.name: float(counts[list(r.labels)].sum()) * voxel for r in self.task.regions}

    @property
    def empty(self) -> bool:
        """Whether no voxel is labelled."""
        return not self.classes.any()

    @property
    def mask(self) -> Any:
        """A nibabel NIfTI image: file values (uint8 or uint16), label intent, the labels' names in `descrip` and an
        extension."""
        image = self.grid.image(self.task.write_labels(self.classes))
        names = {label.value: label.name for label in self.task.labels}
        image.header.set_intent("label", name=self.task.name[:16], allow_unknown=False)
        image.header["descrip"] = "; ".join(f"{v} {n}" for v, n in names.items() if v)[:79].encode()
        image.header["cal_max"] = max(names)
        comment = json.dumps({"task": self.task.name, "labels": names})
        image.header.extensions.append(Nifti1Extension("comment", comment.encode()))
        return image

    def writing(self, values: Mapping[str, int]) -> Segmentation:
        """The same with other file values, by label name. Raises `TaskError` for one the label is not read under."""
        return replace(self, task=self.task.writing(values))

    def save(self, path: Path) -> None:
        """Write the mask (.nii or .nii.gz), whole or not at all."""
        save_image(self.mask, path)


class OptionError(ValueError):
    """An option that this model or this device cannot have. The message says which, and what it can have."""


class Predictor:
    """Segments patients with one checkpoint on one device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str | torch.device = "cpu",
        *,
        overlap: float = OVERLAP,
        window: Sequence[int] | None = None,
        precision: str = "float32",
        batch: int | None = None,
    ) -> None:
        """`overlap`: share of a window that the next one covers again, along each axis. `window`: voxels along each
        axis, by default those of the patches that the model was trained on. `precision`: of the encoders' arithmetic.
        `batch`: windows at a time, by default as many as pay on the device. Raises `OptionError`.
        """
        self.task = checkpoint.card.task
        self.device = torch.device(device)
        if not 0 <= overlap <= MOST_OVERLAP:
            raise OptionError(f"an overlap of {overlap:g} cannot be had: give a share from 0 to {MOST_OVERLAP:g}")
        self.overlap = overlap
        self.window = self.task.patch_size if window is None else _fitting(window, checkpoint)
        self.precision = precision
        try:
            check_precision(precision, self.device)
        except PrecisionError as error:
            raise OptionError(str(error)) from None
        self._batch = batch
        self._checkpoint = checkpoint
        self._network: Any = checkpoint.network.to(self.device).eval()

    @property
    def card(self) -> Card:
        """What the checkpoint says of itself."""
        return self._checkpoint.card

    def leaner(self) -> Predictor:
        """The same network on the same device in less memory: one window at a time, half as large along each axis where
        the backbone can and trained patches have more than its least. Masks of smaller windows differ a little."""
        entry = BACKBONES[self._checkpoint.card.backbone]
        least = 2 * entry.divisor
        smaller = [min(n, max(least, n // 2 // entry.divisor * entry.divisor)) for n in self.window]
        window = None if entry.fixed else smaller
        overlap, precision = self.overlap, self.precision
        return Predictor(self._checkpoint, self.device, overlap=overlap, window=window, precision=precision, batch=1)

    def segment(
        self,
        files: Mapping[str, Path | Volume],
        on_progress: Progress | None = None,
        *,
        preprocess: str = NONE,
        grid: str | None = None,
        on_volume: OnVolume = lambda _name, _volume: None,
        probabilities: bool = False,
    ) -> Segmentation:
        """Segment a patient from any non-empty subset of modalities.

        `files` is keyed by modality name or alias; each is NIfTI, or a folder or zip of one DICOM series. The mask
        comes back on the first one's grid, or on that of the modality that `grid` names. `preprocess`: see
        `models.raw.prepare`. `on_progress(stage, fraction)` is called along the way and may raise to stop;
        `on_volume(modality, volume)` sees each volume as it was given. `probabilities`: whether the answer keeps the
        regions' (a few bytes per voxel of the brain). Raises `TaskError`
        for modalities that are not the task's and `VolumeError`, naming the modality, for images that cannot be used.
        """
        report = on_progress or (lambda _stage, _fraction: None)
        if not files:
            raise TaskError(f"no modality given: give at least one of {', '.join(self.task.names)}")
        volumes: dict[str, Volume] = {}
        for done, (given, file) in enumerate(files.items()):
            report("loading", done / len(files))
            name = self.task.canonical(given)
            if name in volumes:
                raise TaskError(f"{name} is given twice (a name and an alias of it)")
            volumes[name] = file if isinstance(file, Volume) else _load(name, file)
            on_volume(name, volumes[name])
        own = {name: volume.grid for name, volume in volumes.items()}
        target = next(iter(own)) if grid is None else self.task.canonical(grid)
        if target not in own:
            raise TaskError(f"the mask cannot lie on the grid of {target}, which is not given: it has {', '.join(own)}")
        prepared = prepare(volumes, self.task, preprocess, report)
        report("normalising", 0.0)
        intake = take_in(prepared.volumes, self.task, self.window)
        onto, warnings = prepared.volumes[target].grid, prepared.warnings
        del volumes, prepared  # the working copies are all that is needed from here on
        found = self.probabilities(intake, lambda fraction: report("segmenting", fraction))
        report("restoring", 0.0)
        kept = None
        if probabilities:
            kept = RegionProbabilities(found, intake.without_images(), onto, own[target], self.task)
        segmentation = Segmentation(intake.restore(found, onto), own[target], self.task, warnings, kept)
        report("restoring", 1.0)
        return segmentation

    @torch.inference_mode()
    def probabilities(
        self, intake: Intake, on_fraction: Callable[[float], None] = lambda _fraction: None
    ) -> npt.NDArray[np.float32]:
        """Class probabilities (C, X, Y, Z) of the intake's box, averaged uniformly over its windows.

        Raises ValueError for a box smaller than a window; `segment` takes one in that is not.
        """
        mask = self.task.mask(intake.arrays)
        there = [k for k, is_there in enumerate(mask) if is_there]
        # In the task's order, whatever order the volumes were given in.
        x = torch.from_numpy(normalised(intake.arrays, [self.task.names[k] for k in there])).to(self.device)
        windows = Windows(intake.box.shape, self.window, self.overlap)

        def found(patches: Tensor) -> Tensor:
            # The channels of missing modalities are never read.
            full = in_fast_layout(patches.new_empty(len(patches), len(mask), *patches.shape[2:]))
            full[:, there] = patches
            return self._of_windows(full, mask)

        on_cpu = self.device.type == "cpu"
        batch, lanes = self._windows_at_a_time(x, mask), min(torch.get_num_threads(), MOST_LANES) if on_cpu else 1
        with kept_heap() if on_cpu else nullcontext():
            averaged = windows.mean(found, x, len(self.task.labels), batch=batch, lanes=lanes, on_fraction=on_fraction)
            result: npt.NDArray[np.float32] = averaged.cpu().numpy()
        return result

    def _of_windows(self, windows: Tensor, mask: Mask) -> Tensor:
        """Class probabilities (B, C, D, H, W) of windows (B, K, D, H, W).

        The decoder stays in single precision: in bfloat16 it would change twice as many voxels as the encoders do.
        """
        with torch.inference_mode():
            with arithmetic(self.precision, self.device):
                encoded = self._network.encode(windows, mask)
            features = [[None if f is None else single(f) for f in level] for level in encoded]
            del encoded
            logits: Tensor = self._network.fuse(features, mask).logits
            return logits.softmax(1)

    def _windows_at_a_time(self, x: Tensor, mask: Mask) -> int:
        """In a lane of a CPU one, whose maps stay in the cache; on a GPU as many as half of the free memory takes."""
        if self._batch is not None:
            return self._batch
        if self.device.type != "cuda":
            return 1
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._of_windows(x.new_zeros(1, len(mask), *self.window), mask)
        of_one = torch.cuda.max_memory_allocated(self.device) - before
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(1, min(MOST_AT_A_TIME, free // 2 // max(of_one, 1)))


def _fitting(window: Sequence[int], checkpoint: Checkpoint) -> tuple[int, int, int]:
    card, said = checkpoint.card, " x ".join(map(str, window))
    entry = BACKBONES[card.backbone]
    if len(window) != 3:
        raise OptionError(f"a window of {said} voxels is none: give one number, or three")
    x, y, z = window
    if (x, y, z) != card.task.patch_size and entry.fixed:
        raise OptionError(
            f"a window of {said} voxels does not fit {card.backbone}: its learned positions are made for "
            f"{' x '.join(map(str, card.task.patch_size))}"
        )
    if not entry.takes(window):
        raise OptionError(
            f"a window of {said} voxels does not fit {card.backbone}: use multiples of {entry.divisor}, "
            f"at least {2 * entry.divisor}, per axis"
        )
    return x, y, z


def _load(name: str, path: Path) -> Volume:
    from models.dicom import DicomSeries, is_series

    try:
        return DicomSeries.open(path).volume() if is_series(path) else Volume.load(path)
    except VolumeError as error:
        raise VolumeError(f"{name}: {error}") from error.__cause__
