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

from models.task import Task
from training.errors import UserError

Float = npt.NDArray[np.float32]


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
        """case.json."""
        try:
            record: dict[str, Any] = json.loads((self.folder / "case.json").read_text())
        except (OSError, ValueError):
            raise UserError(f"{self.folder}: case.json is missing or damaged; run `passion prepare` again") from None
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
        image: Float = self._map(f"{modality}.npy")
        return image

    def labels(self) -> npt.NDArray[np.uint8]:
        """Memory map of the class indices, uint8."""
        labels: npt.NDArray[np.uint8] = self._map("seg.npy")
        return labels

    def statistics(self, modality: str) -> tuple[float, float]:
        """Mean and standard deviation inside the brain."""
        return self.record["mean"][modality], self.record["std"][modality]

    def _map(self, name: str) -> Any:
        try:
            return np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            raise UserError(f"{self.folder}: {name} is missing or damaged; run `passion prepare` again") from None


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
