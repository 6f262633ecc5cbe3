"""The released BraTS2020 split, and who misses what in it under each published imbalance.

train.txt, val.txt and test.txt list 219, 50 and 100 of its 369 training subjects. `mr2468.csv` and its like are the
missingness tables: the digits are the missing rates of t1, t1ce, flair and t2 in tenths.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from models.task import Task
from training.errors import UserError
from training.missingness import GLIOMA, MissingnessTable
from training.splits import PARTS, Names, Split

FOLDER = Path(__file__).parent
IMBALANCES = tuple(sorted(path.stem for path in FOLDER.glob("mr*.csv")))


def subjects() -> list[str]:
    """The names in the published lists, which put the grade in front: `HG_BraTS20_Training_002`."""
    return [name for part in PARTS for name in (FOLDER / f"{part}.txt").read_text().split()]


def lacking(ids: Iterable[str]) -> list[str]:
    """The published subjects that a data set does not have."""
    names = Names(ids)
    return [name for name in subjects() if names.match(name) is None]


def load(name: str, task: Task, ids: Iterable[str]) -> tuple[Split, dict[str, tuple[bool, ...]]]:
    """The split, and the masks of its training subjects under one imbalance, with the data set's own ids.

    Raises `UserError` for another name, task or data set.
    """
    if name not in IMBALANCES:
        raise UserError(f"--published {name}: choose one of {', '.join(IMBALANCES)}; --preset takes any four digits")
    if task.names != GLIOMA:
        raise UserError(
            f"--published {name}: the assignments are of {', '.join(GLIOMA)}, and task {task.name} has "
            f"{', '.join(task.names)}; use --missing"
        )
    ids = list(ids)
    absent = lacking(ids)
    if absent:
        raise UserError(
            f"--published {name}: the data set lacks {len(absent)} of BraTS2020's {len(subjects())} subjects, such as "
            f"{absent[0]}; add them, or draw with --preset {name}"
        )
    names = Names(ids)
    masks = MissingnessTable.read(FOLDER / f"{name}.csv", task).masks
    return Split.read(FOLDER, ids), {names.match(listed) or listed: mask for listed, mask in masks.items()}
