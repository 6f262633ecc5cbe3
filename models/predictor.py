"""`Predictor`: a patient's files in, a mask on the first file's own grid out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.inferers import sliding_window_inference
from nibabel.nifti1 import Nifti1Extension
from torch import Tensor

from models.checkpoint import Checkpoint
from models.intake import Intake, normalise, take_in
from models.layout import in_fast_layout
from models.task import Task, TaskError
from models.volume import Grid, Volume, VolumeError, save_image

OVERLAP = 0.5
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Segmentation:
    """A mask on the patient's own grid."""

    classes: npt.NDArray[np.uint8]
    """(X, Y, Z) class indices on the first given volume's grid."""
    grid: Grid
    task: Task

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

    def save(self, path: Path) -> None:
        """Write the mask (.nii or .nii.gz), whole or not at all."""
        save_image(self.mask, path)


class Predictor:
    """Segments patients with one checkpoint on one device."""

    def __init__(self, checkpoint: Checkpoint, device: str | torch.device = "cpu") -> None:
        self.task = checkpoint.card.task
        self.device = torch.device(device)
        self._network: Any = checkpoint.network.to(self.device).eval()

    def segment(self, files: Mapping[str, Path | Volume], on_progress: Progress | None = None) -> Segmentation:
        """Segment a patient from any non-empty subset of modalities.

        `files` is keyed by modality name or alias; the mask comes back on the first one's grid. `on_progress(stage,
        fraction)` is called along the way and may raise to stop. Raises `TaskError` for modalities that are not the
        task's and `VolumeError`, naming the modality, for images that cannot be used.
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
        report("normalising", 0.0)
        intake = take_in(volumes, self.task)
        grid = intake.working.reference
        del volumes  # the working copies are all that is needed from here on
        probabilities = self.probabilities(intake, lambda fraction: report("segmenting", fraction))
        report("restoring", 0.0)
        segmentation = Segmentation(intake.restore(probabilities), grid, self.task)
        report("restoring", 1.0)
        return segmentation

    @torch.inference_mode()
    def probabilities(
        self, intake: Intake, on_fraction: Callable[[float], None] = lambda _fraction: None
    ) -> npt.NDArray[np.float32]:
        """Class probabilities (C, X, Y, Z) of the intake's box, averaged uniformly over half-overlapping windows."""
        arrays = normalise(intake.arrays)
        mask = self.task.mask(arrays)
        there = [k for k, is_there in enumerate(mask) if is_there]
        # In the task's order, whatever order the volumes were given in.
        x = torch.from_numpy(np.stack([arrays[self.task.names[k]] for k in there]))[None].to(self.device)
        total, done = window_count(intake.box.shape, self.task.patch_size), 0

        def window(patch: Tensor) -> Tensor:
            nonlocal done
            # The channels of missing modalities are never read.
            full = in_fast_layout(patch.new_empty(patch.shape[0], len(mask), *patch.shape[2:]))
            full[:, there] = patch
            p: Tensor = self._network.fuse(self._network.encode(full, mask), mask).logits.softmax(1)
            done += len(patch)
            on_fraction(done / total)
            return p

        on_fraction(0.0)
        averaged = sliding_window_inference(x, self.task.patch_size, 1, window, overlap=OVERLAP, mode="constant")
        assert isinstance(averaged, Tensor)
        result: npt.NDArray[np.float32] = averaged[0].cpu().numpy()
        return result


def window_count(shape: tuple[int, int, int], patch: tuple[int, int, int], overlap: float = OVERLAP) -> int:
    """How many windows cover a volume of `shape`, the last of each axis flush with its end."""
    total = 1
    for size, window in zip(shape, patch, strict=True):
        step = int(window * (1 - overlap))
        total *= ceil((size - window) / step) + 1
    return total


def _load(name: str, path: Path) -> Volume:
    try:
        return Volume.load(path)
    except VolumeError as error:
        raise VolumeError(f"{name}: {error}") from error.__cause__
