"""What is wrong with a definition that only its parts together, or the rest of the package, can tell."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from models.backbones import BACKBONES
from models.task import Task, TaskError, first_problem
from training import published
from training.config import TrainConfig
from training.errors import UserError
from training.experiments.definition import NOWHERE, Arm, Definition, Imbalance, train_config
from training.missingness import preset

OURS = ("data", "split", "out", "name", "description", "device")
AXES = {"backbone": "backbones", "method": "arms", "regime": "arms", "seed": "seeds"}
"""Training values that the grid sets, and where."""


def problems(definition: Definition) -> Iterator[str]:
    """One line each, with the field."""
    for key in definition.train:
        if key in OURS:
            yield f"train.{key}: set by the experiment, not by its definition"
        if key in AXES:
            yield f"train.{key}: belongs to the grid; give it under {AXES[key]}"
    for backbone in definition.backbones:
        if backbone not in BACKBONES:
            yield f"backbones: {backbone!r} is unknown; there are {', '.join(BACKBONES)}"
    try:
        task = definition.task()
    except UserError as error:
        yield str(error)
        return
    for subset in definition.evaluate.subsets or ():
        try:
            task.mask(task.canonical(name) for name in subset.split("+"))
        except TaskError as error:
            yield f"evaluate.subsets: {error}"
    for imbalance in definition.imbalances:
        yield from _of_imbalance(definition, imbalance, task)
    for arm in definition.arms:
        yield from _of_arm(definition, arm, task)


def plain(message: str) -> str:
    """Pydantic's words on one line, without its own."""
    return " ".join(message.replace("Value error, ", "").split())


def _of_imbalance(definition: Definition, imbalance: Imbalance, task: Task) -> Iterator[str]:
    where = f"imbalances.{imbalance.name}"
    takes_published = definition.data.source is not None and definition.data.source.published
    try:
        if imbalance.missing is not None:
            for name in imbalance.missing:
                task.canonical(name)
            if takes_published:
                yield f"{where}: missing rates are drawn; give data.source published: false, val and test"
        elif not takes_published:
            preset(imbalance.name, task)
        elif imbalance.name not in published.IMBALANCES:
            yield f"{where}: not published; there are {', '.join(published.IMBALANCES)}"
    except (TaskError, UserError) as error:
        yield f"{where}: {error}"


def _of_arm(definition: Definition, arm: Arm, task: Task) -> Iterator[str]:
    def where(field: str) -> str:
        return f"arms.{arm.name}" if field in AXES else "train"

    found: dict[str, None] = {}  # in order, each once: backbones share most of what may be wrong
    for backbone in (b for b in definition.backbones if b in BACKBONES):
        try:
            config = train_config(definition, backbone, arm, definition.seeds[0], *NOWHERE)
        except ValidationError as error:
            first = error.errors()[0]
            field = str(first["loc"][0]) if first["loc"] else ""
            if first["type"] == "extra_forbidden":
                yield f"train: unknown key {field!r}; known keys: {', '.join(TrainConfig.model_fields)}"
            said = plain(first_problem(error))
            yield f"{where(field)}.{said}" if field else f"{where(field)}: {said}"
            return
        full = config.model_copy(update={"crop": config.crop or task.patch_size})
        found |= dict.fromkeys(f"{where(line.partition(':')[0])}.{line}" for line in full.problems())
    yield from found
