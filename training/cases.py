"""`PreparedCase` and `PreparedDataset`: what `passion prepare` wrote, as training reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from models.intake import Box
from models.task import Task
from training.errors import UserError
from training.mapped import read_box, read_one

Float = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]
Places = npt.NDArray[np.uint32]

LABELS = "seg"
LABELLED = "seg-labelled"
"""The index of labelled voxels. No modality has a hyphen in its name, so none is called this."""

_BY_MODALITY = ("mean", "std")


def labelled_places(labels: Labels) -> Places:
    """Where labels (X, Y, Z) are not background: places in C order, ascending, as `LABELLED`.npy holds them."""
    return np.flatnonzero(labels).astype(np.uint32)  # MAX_WORKING_VOXELS is far below 2^32


@dataclass(frozen=True)
class PreparedCase:
    """One subject's arrays on disk, memory-mapped: (X, Y, Z), one grid, cropped to the brain, not normalised."""

    folder: Path

    @property
    def id(self) -> str:
        """The subject's name."""
        return self.folder.name

    @cached_property
    def record(self) -> dict[str, Any]:
        """case.json. Raises `UserError` if it is not as `passion prepare` writes it."""
        try:
            record: dict[str, Any] = json.loads((self.folder / "case.json").read_text())
            whole = len(record["shape"]) == 3 and all(record[k].keys() >= {*record["modalities"]} for k in _BY_MODALITY)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise self._problem("case.json is missing or damaged")
        return record

    @property
    def modalities(self) -> list[str]:
        """Canonical names of what the subject has."""
        names: list[str] = self.record["modalities"]
        return names

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels per axis."""
        x, y, z = self.record["shape"]
        return x, y, z

    def image(self, modality: str) -> Float:
        """Memory map of a modality, float32."""
        image: Float = self._volume(modality, np.float32)
        return image

    def labels(self) -> Labels:
        """Memory map of the class indices, uint8."""
        labels: Labels = self._volume(LABELS, np.uint8)
        return labels

    def normalised(self, modality: str, box: Box) -> Float:
        """A box of a modality, normalised; outside the volume as its background. Only the box is read."""
        image = read_box(self.image(modality), box)
        mean, std = self.statistics(modality)
        image -= np.float32(mean)
        image /= np.float32(std)
        return image

    def classes(self, box: Box) -> Labels:
        """A box of the class indices, 0 outside the volume. Only the box is read."""
        return read_box(self.labels(), box)

    def statistics(self, modality: str) -> tuple[float, float]:
        """Mean and standard deviation inside the brain."""
        return self.record["mean"][modality], self.record["std"][modality]

    def labelled_voxel(self, rng: np.random.Generator) -> tuple[int, int, int] | None:
        """One of the voxels that are not background, drawn uniformly; None if there is none.

        One page of the index is read and one of the labels. Folders without the index, of earlier versions, give the
        same voxel for reading all labels. Raises `UserError` if the index is not that of the labels.
        """
        places, labels = self._labelled(), self.labels()
        if len(places) == 0:
            return None
        place = int(read_one(places, int(rng.integers(len(places)))))
        if place >= labels.size or not read_one(labels, place):
            raise self._problem(f"{LABELLED}.npy does not fit {LABELS}.npy")
        x, y, z = np.unravel_index(place, self.shape)
        return int(x), int(y), int(z)

    def _labelled(self) -> Places:
        """The index of labelled voxels, memory-mapped where there is one."""
        if not (self.folder / f"{LABELLED}.npy").exists():
            return labelled_places(self.labels())
        places: Places = self._map(LABELLED)
        counts = self.record.get("label_voxels", [])
        if places.ndim != 1 or places.dtype != np.uint32 or len(places) != sum(counts[1:]):
            raise self._problem(f"{LABELLED}.npy does not fit case.json")
        return places

    def _volume(self, name: str, dtype: type[np.generic]) -> Any:
        volume = self._map(name)
        if volume.shape != self.shape or volume.dtype != dtype or not volume.flags.c_contiguous:
            raise self._problem(
                f"{name}.npy is {volume.dtype} {volume.shape} and not {np.dtype(dtype)} {self.shape} in C order"
            )
        return volume

    def _map(self, name: str) -> Any:
        try:
            return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise self._problem(f"{name}.npy is missing or damaged") from None

    def _problem(self, what: str) -> UserError:
        return UserError(f"{self.folder}: {what}; run `passion prepare` again")


@dataclass(frozen=True)
class PreparedDataset:
    """A folder of prepared cases and the task they were prepared for."""

    root: Path
    task: Task
    ids: tuple[str, ...]

    @classmethod
    def open(cls, root: Path) -> PreparedDataset:
        """Raises `UserError` if `root` is no prepared data set."""
        path = root / "dataset.json"
        try:
            content = json.loads(path.read_text())
            return cls(root, Task.model_validate(content["task"]), tuple(content["cases"]))
        except OSError:
            raise UserError(f"{root}: no dataset.json here; make it with `passion prepare SRC {root}`") from None
        except (ValueError, KeyError, ValidationError):
            raise UserError(f"{path}: damaged or of another version; run `passion prepare` again") from None

    def case(self, case_id: str) -> PreparedCase:
        """A case by name. Raises `UserError` if it is not of the data set."""
        if case_id not in self.ids:
            raise UserError(f"{self.root}: has no case {case_id!r}; does the split belong to this data set?")
        return PreparedCase(self.root / case_id)
