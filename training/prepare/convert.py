"""One subject: raw files in, arrays and `case.json` out, or the reason why not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.intake import statistics, take_in
from models.task import Task, TaskError
from models.volume import Grid, Volume, VolumeError, load_image
from training.cases import LABELLED, LABELS, labelled_places
from training.prepare.raw_case import RawCase

PARTIAL = ".partial-"
"""Prefix of folders being written; what a killed run left under it is swept up by the next."""

_VERSION = 2  # raise when the arrays' meaning changes, so that old ones are made anew


class BrokenCaseError(Exception):
    """A subject that cannot be used; the message says why in one line."""


def fingerprint(case: RawCase, task: Task) -> str:
    """Changes when a source file's name, size or time, the task or this code's version does."""
    files = {**case.images, "seg": case.labels}
    stats = {w: (p.name, p.stat().st_size, p.stat().st_mtime_ns) for w, p in files.items() if p is not None}
    content = json.dumps([_VERSION, task.model_dump(mode="json"), stats], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def read_record(folder: Path) -> dict[str, Any] | None:
    """`case.json` of a prepared subject whose arrays are all there, else None."""
    try:
        record: dict[str, Any] = json.loads((folder / "case.json").read_text())
        arrays = [f"{name}.npy" for name in (*record["modalities"], LABELS, LABELLED)]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if all((folder / a).is_file() for a in arrays) else None


def convert(case: RawCase, task: Task, out: Path) -> dict[str, Any]:
    """Prepare one subject into `out/<id>`, whole or not at all; returns its record.

    Arrays are float32 (images) and uint8 class indices (seg), C-order, on the task's orientation and spacing, cropped
    to the brain as `models.intake` crops for serving, not normalised; and the places of the labelled voxels, so that
    a crop around one is found without reading all labels. Raises `BrokenCaseError`.
    """
    if case.problem is not None or case.labels is None:
        raise BrokenCaseError(case.problem or "no segmentation")
    volumes = {name: _load(path) for name, path in case.images.items()}
    values, grid = _load_labels(case.labels)
    first = next(iter(volumes))
    shapes = {name: volume.grid.shape for name, volume in volumes.items()} | {"seg": grid.shape}
    other = next((name for name, shape in shapes.items() if shape != shapes[first]), None)
    if other is not None:
        raise BrokenCaseError(
            f"shapes differ: {case.images[first].name} has {shapes[first]}, "
            f"{(case.images.get(other) or case.labels).name} has {shapes[other]}"
        )
    if not grid.same_as(volumes[first].grid):
        raise BrokenCaseError(f"{case.labels.name} lies elsewhere than {case.images[first].name}: their affines differ")
    try:
        classes = task.read_labels(values)
        intake = take_in(volumes, task)
        found = statistics(intake.arrays)
    except (VolumeError, TaskError) as error:
        raise BrokenCaseError(str(error)) from None
    on_grid = intake.working.bring_classes(classes, grid, len(task.labels))
    labels = np.ascontiguousarray(intake.box.cut(on_grid), np.uint8)
    if classes.any() and not labels.any():
        raise BrokenCaseError(f"{case.labels.name}: all its labels lie outside the brain")
    record = {
        "id": case.id,
        "modalities": list(intake.arrays),
        "shape": list(labels.shape),
        "spacing": list(task.spacing),
        "mean": {name: mean for name, (mean, _) in found.items()},
        "std": {name: std for name, (_, std) in found.items()},
        "label_voxels": np.bincount(labels.ravel(), minlength=len(task.labels)).tolist(),
        "label_values": sorted(int(v) for v in np.unique(values)),
        "source": fingerprint(case, task),
    }
    _write(out, case.id, {**intake.arrays, LABELS: labels, LABELLED: labelled_places(labels)}, record)
    return record


def _load(path: Path) -> Volume:
    try:
        return Volume.load(path)
    except VolumeError as error:
        raise BrokenCaseError(f"{path.name}: {error}") from None


def _load_labels(path: Path) -> tuple[npt.NDArray[np.generic], Grid]:
    try:
        image = load_image(path)
        return np.asarray(image.dataobj).reshape(image.shape[:3]), Grid.of(image)
    except VolumeError as error:
        raise BrokenCaseError(f"{path.name}: {error}") from None
    except (OSError, EOFError, ValueError, zlib.error):
        raise BrokenCaseError(f"{path.name}: the image data is incomplete or damaged") from None


def _write(out: Path, name: str, arrays: dict[str, npt.NDArray[Any]], record: dict[str, Any]) -> None:
    target = out / name
    making = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=out))
    try:
        for key, array in arrays.items():
            np.save(making / f"{key}.npy", np.ascontiguousarray(array), allow_pickle=False)
        (making / "case.json").write_text(json.dumps(record, indent=1) + "\n")
        making.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=out))
            os.replace(target, old / name)
            os.replace(making, target)
            shutil.rmtree(old)
        else:
            os.replace(making, target)
    finally:
        shutil.rmtree(making, ignore_errors=True)
