"""`Task`: which images go in, which labels come out, and on what grid a network sees them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.names import LABELS, FileNames

TASKS = Path(__file__).parent / "tasks"

Positive = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
FileValue = Annotated[int, Field(ge=0, le=65535)]

STORED = "stored"
"""The `orientation` of a task whose grid keeps the axes of the files as they are."""

RESERVED = LABELS
"""What prepared data sets call the labels; no modality may have this name."""


class TaskError(ValueError):
    """A task that contradicts itself, or input that does not belong to the task. The message says what to do."""


def first_problem(error: ValidationError) -> str:
    """The first thing that pydantic found, as one line: the field and what is wrong with it."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Modality(_Frozen):
    """One image contrast. `name` is the column, file suffix, form field and option; `aliases` are read as it."""

    name: Name
    aliases: tuple[Name, ...] = ()
    description: str = ""


class Label(_Frozen):
    """One class. Its index is its place in `Task.labels`; `value` is what files hold for it."""

    name: str
    value: FileValue
    also_read: tuple[FileValue, ...] = ()
    """Other values read as this label, where data sets differ."""


class Region(_Frozen):
    """A union of classes that is scored as one, by class index."""

    name: str
    labels: tuple[int, ...]
    description: str = ""
    min_ml: float = Field(default=0, ge=0)
    """mL: a prediction smaller than this is also scored as if it were empty, as `<name>_pp`. 0: scored once."""


class Task(_Frozen):
    """A segmentation task. Nothing elsewhere knows how many modalities or classes there are, or their names."""

    name: str
    description: str = ""
    modalities: tuple[Modality, ...] = Field(min_length=1)
    labels: tuple[Label, ...] = Field(min_length=2, max_length=256)
    label_suffixes: tuple[Name, ...] = Field(default=("seg",), min_length=1)
    """What the names of files with labels end in, as `seg` in `<id>_seg.nii.gz`."""
    regions: tuple[Region, ...] = Field(min_length=1)
    patch_size: tuple[int, int, int]
    """Voxels of a training crop and of an inference window."""
    spacing: tuple[Positive, Positive, Positive]
    """mm per voxel of the grid the network works on, along the axes of `orientation`."""
    orientation: str = "LPS"
    """Axis codes of that grid, as nibabel writes them (the direction in which each axis grows). `stored` leaves the
    files' axes as they are: for scans taken along the organ, not the body, so that no body axis is the slices' own."""
    min_crop: int = Field(default=128, ge=1)
    """Voxels: the crop to the brain keeps at least this many per axis where the volume has them."""

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        names = [n for m in self.modalities for n in (m.name, *m.aliases)]
        if len(set(names)) != len(names):
            raise TaskError(f"task {self.name}: a modality name or alias stands twice in {names}")
        taken = next((n for n in names if n in {RESERVED, *self.label_suffixes}), None)
        if taken is not None:
            raise TaskError(f"task {self.name}: {taken} means the labels; call the modality something else")
        if self.labels[0].value != 0:
            raise TaskError(f"task {self.name}: the first label is the background and must have value 0")
        values = [v for lab in self.labels for v in (lab.value, *lab.also_read)]
        if len(set(values)) != len(values):
            raise TaskError(f"task {self.name}: a label value stands twice in {values}")
        if len({r.name for r in self.regions}) != len(self.regions):
            raise TaskError(f"task {self.name}: two regions have one name")
        for region in self.regions:
            if not region.labels or not all(0 < i < len(self.labels) for i in region.labels):
                raise TaskError(
                    f"task {self.name}: region {region.name} must list class indices from 1 to {len(self.labels) - 1}"
                )
        codes = self.orientation
        if codes != STORED and (len(codes) != 3 or any(len(set(p) & set(codes)) != 1 for p in ("LR", "PA", "IS"))):
            raise TaskError(
                f"task {self.name}: orientation {codes!r} is neither three axis codes such as LPS nor {STORED!r}"
            )
        if any(p < 8 for p in self.patch_size):
            raise TaskError(f"task {self.name}: a patch of {self.patch_size} is too small; use 16 voxels or more")
        return self

    @classmethod
    def load(cls, name_or_path: str | Path) -> Task:
        """A shipped task by name (`glioma`), or any task from a YAML file. Raises `TaskError` naming the field."""
        import yaml  # only training reads YAML; a checkpoint carries its task as JSON

        path = Path(name_or_path)
        if path.suffix not in {".yaml", ".yml"}:
            path = TASKS / f"{name_or_path}.yaml"
        if not path.is_file():
            shipped = ", ".join(sorted(p.stem for p in TASKS.glob("*.yaml")))
            raise TaskError(f"no task {str(name_or_path)!r}: give a YAML file or one of the shipped tasks ({shipped})")
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()))
        except yaml.YAMLError as error:
            raise TaskError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        except ValidationError as error:
            raise TaskError(f"{path}: {first_problem(error)}") from None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Modality names, in the network's order."""
        return tuple(m.name for m in self.modalities)

    @cached_property
    def _by_any_name(self) -> dict[str, str]:
        return {n: m.name for m in self.modalities for n in (m.name, *m.aliases)}

    @cached_property
    def file_names(self) -> FileNames:
        """What files of this task are called."""
        return FileNames({m.name: m.aliases for m in self.modalities}, self.label_suffixes)

    def canonical(self, name: str) -> str:
        """The modality's own name for a name or alias, in any case. Raises `TaskError` for one not of the task."""
        try:
            return self._by_any_name[name.lower()]
        except KeyError:
            raise TaskError(f"{name!r} is no modality of task {self.name}: it has {', '.join(self.names)}") from None

    def mask(self, present: Iterable[str]) -> tuple[bool, ...]:
        """Presence of each modality, in order, for the canonical names that are there."""
        given = set(present)
        unknown = given - set(self.names)
        if unknown:
            raise TaskError(f"{sorted(unknown)} are no modalities of task {self.name}: it has {', '.join(self.names)}")
        return tuple(name in given for name in self.names)

    def subsets(self) -> list[tuple[str, ...]]:
        """All 2^K - 1 non-empty subsets of modality names, by size and then in order."""
        return [s for n in range(1, len(self.names) + 1) for s in combinations(self.names, n)]

    def read_labels(self, values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
        """Class indices (uint8, same shape) for a file's label values. Raises `TaskError` naming foreign values."""
        table: dict[int, int] = {v: i for i, lab in enumerate(self.labels) for v in (lab.value, *lab.also_read)}
        found = np.unique(values)
        foreign = [v.item() for v in found if v.item() not in table]
        if foreign:
            raise TaskError(f"label values {foreign[:8]} are not of task {self.name}: it reads {sorted(table)}")
        classes = np.zeros(values.shape, np.uint8)
        for value in found:
            classes[values == value] = table[value.item()]
        return classes

    def write_labels(self, classes: npt.NDArray[np.integer]) -> npt.NDArray[np.unsignedinteger]:
        """File values (same shape) for class indices, in the smallest type that holds the task's: uint8 or uint16."""
        values = [lab.value for lab in self.labels]
        written: npt.NDArray[np.unsignedinteger] = np.array(values, np.min_scalar_type(max(values)))[classes]
        return written

    def writing(self, values: Mapping[str, int]) -> Task:
        """The same task writing other values of its labels, by label name. Raises `TaskError` for a label that is not
        there, or that is not read under that value."""
        places = {label.name: index for index, label in enumerate(self.labels)}
        for name, value in values.items():
            if name not in places:
                raise TaskError(f"task {self.name} has no label {name!r}: it has {', '.join(places)}")
            label = self.labels[places[name]]
            if value not in (label.value, *label.also_read):
                known = " or ".join(map(str, sorted((label.value, *label.also_read))))
                raise TaskError(f"{name} of task {self.name} cannot be written as {value}: its value is {known}")
        return self.with_label_values({places[name]: value for name, value in values.items()})

    def with_label_values(self, values: Mapping[int, int]) -> Task:
        """The same task writing other file values, by class index; a value given up stays readable."""
        labels = []
        for index, label in enumerate(self.labels):
            value = values.get(index, label.value)
            known = {label.value, *label.also_read} - {value}
            labels.append(Label(name=label.name, value=value, also_read=tuple(sorted(known))))
        return Task.model_validate(self.model_dump() | {"labels": labels})
