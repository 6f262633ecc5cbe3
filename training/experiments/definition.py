"""`Definition`: an experiment, read from YAML: the data, the grid of runs, how they train and how they are judged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.task import Task, TaskError, first_problem
from training.config import TrainConfig
from training.errors import UserError
from training.metrics import CONVENTIONS

SHIPPED = Path(__file__).parent
BASELINE = "baseline"

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9+_.-]*$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TestPhantoms(_Part):
    """Patients that no run has seen: a collection of its own."""

    __test__ = False  # not a test, whatever pytest makes of the name

    subjects: Count
    seed: Seed


class Phantoms(_Part):
    """Synthetic patients, the same for every run of the experiment."""

    subjects: Count
    """Training patients."""
    seed: Seed
    spacing: float = Field(default=1.0, ge=0.5, le=10)
    """mm"""
    shape: tuple[Count, Count, Count] | None = None
    """Voxels; 240 x 240 x 155 mm if not given."""
    test: TestPhantoms

    @model_validator(mode="after")
    def _unseen(self) -> Phantoms:
        if self.test.seed == self.seed:
            raise ValueError("test.seed must differ from seed, or the test phantoms are the training ones")
        return self


class Source(_Part):
    """A folder of real scans, named on the command line with --data."""

    published: bool = True
    """The published lists and missingness tables, by imbalance; else both are drawn, and these shares left out:"""
    val: float = Field(default=0.1, ge=0)
    test: float = Field(default=0.2, gt=0)


class Data(_Part):
    """Where the subjects come from; exactly one of `phantom` and `source`."""

    task: str = "glioma"
    """A shipped task by name, or a YAML file."""
    phantom: Phantoms | None = None
    source: Source | None = None

    @model_validator(mode="after")
    def _one(self) -> Data:
        if (self.phantom is None) == (self.source is None):
            raise ValueError("give one of phantom and source")
        return self


class Imbalance(_Part):
    """Missing rates under a name: a preset (`mr2468`), a published table of that name, or rates of one's own."""

    name: Name
    missing: dict[str, Annotated[float, Field(ge=0, lt=1)]] | None = None
    """By modality; none: the name is a preset's or a published table's."""


class Arm(_Part):
    """One way to train. The arm named `baseline` is what the others are compared with."""

    name: Name
    method: str = "none"
    regime: str = "idt"

    @property
    def complete(self) -> bool:
        """Trained on complete subjects, so the same under every imbalance."""
        return self.regime == "pdt"


class Evaluate(_Part):
    """How the trained models are judged."""

    empty: str = "published"
    subsets: tuple[str, ...] | None = None
    """Such as `flair+t2`; all of them if not given."""

    @model_validator(mode="after")
    def _known(self) -> Evaluate:
        if self.empty not in CONVENTIONS:
            raise ValueError(f"empty: {self.empty!r} is unknown: use one of {', '.join(CONVENTIONS)}")
        return self


class Definition(_Part):
    """The grid is backbones x imbalances x arms x seeds. `resolved` by one scale, if the definition has scales."""

    name: Name
    description: str = ""
    scale: str | None = None
    """The scale that the values are of."""
    data: Data
    imbalances: tuple[Imbalance, ...] = Field(min_length=1)
    backbones: tuple[str, ...] = Field(min_length=1)
    arms: tuple[Arm, ...] = Field(min_length=1)
    seeds: tuple[Seed, ...] = Field(min_length=1)
    train: dict[str, Any] = {}
    """Values of `TrainConfig`, but for those that the grid sets."""
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="before")
    @classmethod
    def _short_imbalances(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("imbalances"), list):
            given = [{"name": i} if isinstance(i, str) else i for i in values["imbalances"]]
            return values | {"imbalances": given}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Definition:
        for field, names in (
            ("arms", [a.name.lower() for a in self.arms]),
            ("imbalances", [i.name for i in self.imbalances]),
            ("backbones", list(self.backbones)),
            ("seeds", list(self.seeds)),
        ):
            twice = next((n for n in names if names.count(n) > 1), None)
            if twice is not None:
                raise ValueError(f"{field}: {twice} stands twice")
        if BASELINE not in [a.name for a in self.arms]:
            raise ValueError(f"arms: one must be named {BASELINE!r}: the others are compared with it")
        return self

    def task(self) -> Task:
        """The task of the data. Raises `UserError`."""
        try:
            return Task.load(self.data.task)
        except TaskError as error:
            raise UserError(f"data.task: {error}") from None

    def training(self) -> dict[str, Any]:
        """What every run has in common, as a cell's identity: data, training values, evaluation."""
        content = self.model_dump(mode="json")
        return {key: content[key] for key in ("data", "train", "evaluate")}

    def as_yaml(self) -> str:
        """The content of definition.yaml; `read` takes it back."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def fingerprint(content: Any) -> str:
    """A short hash of JSON content, the same for equal content."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def shipped() -> dict[str, Path]:
    """The definitions that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def scales(path: Path) -> list[str]:
    """Names of the scales a definition file has; the first is the default."""
    found = _content(path).get("scales") or {}
    return list(found) if isinstance(found, dict) else []


def find(name_or_path: str) -> Path:
    """The file of a shipped definition, or the file itself. Raises `UserError`."""
    if name_or_path in shipped():
        return shipped()[name_or_path]
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        return path
    raise UserError(f"no experiment {name_or_path!r}: give a YAML file or one of {', '.join(shipped())}")


def read(path: Path, scale: str | None = None) -> Definition:
    """A definition with the values of `scale` in place (the first scale if none is named).

    Raises `UserError`, one line with file and field, for anything unknown, missing or impossible, training values
    included.
    """
    content = _content(path)
    known = content.pop("scales", None) or {}
    if not isinstance(known, dict) or not all(isinstance(v, dict | None) for v in known.values()):
        raise UserError(f"{path}: scales: expected names with values under them")
    if scale is not None and scale not in known:
        raise UserError(f"{path}: no scale {scale!r}; it has {', '.join(known) or 'none'}")
    chosen = scale or next(iter(known), None)
    if chosen is not None:
        changes = known[chosen] or {}
        unknown = set(changes) - {"data", "imbalances", "backbones", "arms", "seeds", "train", "evaluate"}
        if unknown:
            raise UserError(f"{path}: scales.{chosen}: a scale cannot change {sorted(unknown)[0]!r}")
        content = _merge(content, changes) | {"scale": chosen}
    try:
        definition = Definition.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            raise UserError(f"{path}: unknown key {'.'.join(str(p) for p in first['loc'])!r}") from None
        raise UserError(f"{path}: {_plain(first_problem(error))}") from None
    for problem in _problems(definition):
        raise UserError(f"{path}: {problem}")
    return definition


def _problems(definition: Definition) -> Iterator[str]:
    """What only the parts together, or the rest of the package, can tell."""
    from models.backbones import BACKBONES

    for backbone in definition.backbones:
        if backbone not in BACKBONES:
            yield f"backbones: {backbone!r} is unknown; there are {', '.join(BACKBONES)}"
    own = sorted(set(definition.train) & {"data", "split", "out", "name", "description", "device"})
    if own:
        yield f"train.{own[0]}: set by the experiment, not by its definition"
    axes = {"backbone": "backbones", "method": "arms", "regime": "arms", "seed": "seeds"}
    of_grid = sorted(set(definition.train) & set(axes))
    if of_grid:
        yield f"train.{of_grid[0]}: belongs to the grid; give it under {axes[of_grid[0]]}"
    try:
        definition.task()
    except UserError as error:
        yield str(error)
    for arm in definition.arms:
        try:
            train_config(definition, definition.backbones[0], arm, definition.seeds[0], Path(), Path(), Path())
        except ValidationError as error:
            first = error.errors()[0]
            field = str(first["loc"][0]) if first["loc"] else ""
            where = f"arms.{arm.name}" if field in {"method", "regime", ""} else "train"
            if first["type"] == "extra_forbidden":
                yield f"{where}: unknown key {field!r}; known keys: {', '.join(TrainConfig.model_fields)}"
            yield f"{where}.{_plain(first_problem(error))}" if field else f"{where}: {_plain(first_problem(error))}"


def train_config(
    definition: Definition, backbone: str, arm: Arm, seed: int, data: Path, split: Path, out: Path
) -> TrainConfig:
    """The configuration of one run. Raises pydantic's `ValidationError`."""
    values = {
        "data": data,
        "split": split,
        "out": out,
        "name": f"{definition.name}: {backbone}, {arm.name}, seed {seed}",
        "backbone": backbone,
        "method": arm.method,
        "regime": arm.regime,
        "seed": seed,
    }
    return TrainConfig.model_validate(definition.train | values)


def _merge(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `content`, level by level; lists are replaced whole."""
    merged = dict(content)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _plain(message: str) -> str:
    return " ".join(message.replace("Value error, ", "").split())


def _content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the definition ({getattr(error, 'strerror', None) or error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `key: value` lines such as `name: my-experiment`")
    return content
