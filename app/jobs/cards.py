"""`ModelCard`: what the service needs to know of a checkpoint, read from its `card.json` without torch."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.jobs.record import Expectation

CARD = "card.json"
ET, ET_VALUE = "ET", 3
"""The region of enhancing tumour, and what files of BraTS hold for it since 2023; before, they held 4."""


class _Lenient(BaseModel):
    # The card belongs to `models`, which checks it strictly when it loads the weights; here we read what we show.
    model_config = ConfigDict(frozen=True, extra="ignore")


class ModalityCard(_Lenient):
    """One image contrast: its name, and the aliases read as it."""

    name: str
    aliases: tuple[str, ...] = ()
    description: str = ""


class LabelCard(_Lenient):
    """One class; `value` is what the mask holds for it, `also_read` what it can be made to hold instead."""

    name: str
    value: int
    also_read: tuple[int, ...] = ()


class RegionCard(_Lenient):
    """A union of classes, by index into the labels, that is measured and scored as one."""

    name: str
    labels: tuple[int, ...]
    description: str = ""


class TaskCard(_Lenient):
    """What goes in and what comes out."""

    name: str
    description: str = ""
    modalities: tuple[ModalityCard, ...] = Field(min_length=1)
    labels: tuple[LabelCard, ...] = Field(min_length=2)
    regions: tuple[RegionCard, ...] = Field(min_length=1)


class SubsetScore(_Lenient):
    """Mean Dice per region over the test set for one subset of modalities."""

    modalities: tuple[str, ...]
    dice: dict[str, float | None]


class Scores(_Lenient):
    """The model's measured table."""

    dataset: str
    cases: int
    subsets: tuple[SubsetScore, ...] = ()


class ModelCard(_Lenient):
    """One served model."""

    name: str
    description: str = ""
    intended_use: str = ""
    task: TaskCard
    backbone: str
    scores: Scores | None = None
    weights_sha256: str = ""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Canonical names, in the network's order."""
        return tuple(m.name for m in self.task.modalities)

    def canonical(self, name: str) -> str | None:
        """The modality that a form field's name or alias stands for, in any case; None if it is not of this model."""
        wanted = name.lower()
        for modality in self.task.modalities:
            if wanted == modality.name or wanted in modality.aliases:
                return modality.name
        return None

    def label_values(self, et_value: int | None) -> dict[str, int]:
        """What a mask is to hold for which label, by name, where that may differ from the card; as `passion predict`.

        `et_value`: for enhancing tumour, None for the default. Raises `LabelValueError` for a value that is not the
        label's, or a task without such a label.
        """
        task = self.task
        places = next((region.labels for region in task.regions if region.name == ET), ())
        label = task.labels[places[0]] if len(places) == 1 else None
        known = () if label is None else tuple(sorted((label.value, *label.also_read)))
        if et_value is not None and et_value not in known:
            whole = f"task {task.name} has no region {ET} of one label"
            raise LabelValueError(whole if label is None else f"task {task.name} knows {label.name} otherwise", known)
        value = ET_VALUE if et_value is None else et_value
        return {label.name: value} if label is not None and value in known else {}

    def expectation(self, given: tuple[str, ...]) -> Expectation | None:
        """What the model scored with exactly these modalities, if its card says."""
        if self.scores is None:
            return None
        for subset in self.scores.subsets:
            if set(subset.modalities) == set(given):
                # Of the regions as they are in the mask that a job gives; a card also scores post-processed ones.
                dice = {r.name: subset.dice.get(r.name) for r in self.task.regions}
                return Expectation(dataset=self.scores.dataset, cases=self.scores.cases, dice=dice)
        return None


class LabelValueError(ValueError):
    """A value that masks of a model cannot hold for a label."""

    def __init__(self, message: str, known: tuple[int, ...]) -> None:
        super().__init__(message)
        self.known = known
        """Those they can."""


class CardError(ValueError):
    """A checkpoint folder whose card cannot be read. The message says which and why."""


@lru_cache(maxsize=64)
def _read(path: Path, _modified: int) -> ModelCard:
    try:
        return ModelCard.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CardError(f"{path.parent.name}/{CARD}: {place}: {first['msg']}") from error


class ModelShelf:
    """The checkpoint folders in one folder. A model is called what its folder is called.

    The folder is looked at anew on each call, and a card is parsed again only when it has changed: a checkpoint that is
    added is served without a restart.
    """

    def __init__(self, root: Path, default: str | None = None) -> None:
        self._root = root
        self._default = default

    def names(self) -> list[str]:
        """All models, sorted."""
        if not self._root.is_dir():
            return []
        return sorted(p.parent.name for p in self._root.glob(f"*/{CARD}") if not p.parent.name.startswith((".", "_")))

    def get(self, name: str) -> ModelCard | None:
        """A model's card, or None if there is no such model. Raises `CardError`."""
        if name not in self.names():  # never a path made of what somebody sent
            return None
        path = self._root / name / CARD
        try:
            return _read(path, path.stat().st_mtime_ns)
        except FileNotFoundError:
            return None

    def folder(self, name: str) -> Path:
        """Where a model's checkpoint is."""
        return self._root / name

    def default(self) -> str | None:
        """The model for requests that name none: as set, else the only one there is."""
        names = self.names()
        if self._default is not None:
            return self._default if self._default in names else None
        return names[0] if len(names) == 1 else None
