"""`Split`: which subjects train, which choose, which judge."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training import atomic
from training.errors import UserError

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Disjoint lists of subject ids."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    @classmethod
    def draw(cls, ids: Iterable[str], val: float, test: float, seed: int) -> Split:
        """A random split by `seed`. `val` and `test` are fractions if below 1, else counts; the rest trains.

        Depends on the set of ids, not on their order. Raises `UserError` if nobody is left to train on.
        """
        names = sorted(set(ids))
        wanted = [_count(part, amount, len(names)) for part, amount in (("val", val), ("test", test))]
        if sum(wanted) >= len(names):
            raise UserError(
                f"--val {val:g} and --test {test:g} leave none of {len(names)} subjects to train on: lower them"
            )
        order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
        first, second = wanted[0], wanted[0] + wanted[1]
        return cls(*(tuple(sorted(part)) for part in (order[second:], order[:first], order[first:second])))

    @classmethod
    def read(cls, folder: Path, ids: Iterable[str]) -> Split:
        """Published lists: train.txt, val.txt and test.txt, one name a line, matched to the data set's ids.

        Raises `UserError` for a list that is missing, or a name that is listed twice or not in the data set.
        """
        names = Names(ids)
        parts: list[tuple[str, ...]] = []
        seen: dict[str, str] = {}
        for part in PARTS:
            path = folder / f"{part}.txt"
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError):
                raise UserError(f"{path}: cannot read it; a split has train.txt, val.txt and test.txt") from None
            found = []
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                here = f"{path}, line {number}"
                subject = names.match(line.strip())
                if subject is None:
                    raise UserError(f"{here}: {line.strip()} is no subject of the data set")
                if subject in seen:
                    raise UserError(f"{here}: {subject} stands in {seen[subject]} already")
                seen[subject] = f"{part}.txt"
                found.append(subject)
            parts.append(tuple(found))
        if not parts[0]:
            raise UserError(f"{folder / 'train.txt'}: lists no subject")
        return cls(*parts)

    def write(self, folder: Path) -> None:
        """Write train.txt, val.txt and test.txt, each whole or not at all."""
        for part in PARTS:
            atomic.write_text(folder / f"{part}.txt", "".join(f"{name}\n" for name in getattr(self, part)))


class Names:
    """The subjects of a data set, found under their own name or a published one.

    Published lists of BraTS put the grade in front (`HG_BraTS20_Training_002`); the data's folders do not.
    """

    def __init__(self, ids: Iterable[str]) -> None:
        self._ids = set(ids)
        self._bare: dict[str, list[str]] = {}
        for name in self._ids:
            self._bare.setdefault(_bare(name), []).append(name)

    def match(self, name: str) -> str | None:
        """The data set's id for a listed name, or None."""
        if name in self._ids:
            return name
        candidates = self._bare.get(_bare(name), [])
        return candidates[0] if len(candidates) == 1 else None


def _bare(name: str) -> str:
    return re.sub(r"^(HGG?|LGG?)_", "", name)


def _count(part: str, amount: float, total: int) -> int:
    if amount < 0:
        raise UserError(f"--{part} {amount:g}: give a fraction below 1 or a number of subjects")
    if amount < 1:
        return round(amount * total)
    if amount != int(amount):
        raise UserError(f"--{part} {amount:g}: above 1 it is a number of subjects and must be whole")
    return int(amount)


def parse_rates(text: str) -> dict[str, float]:
    """`t1=0.2,flair=0.6` as a mapping. Raises `UserError`."""
    rates: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            rate = float(value)
        except ValueError:
            raise UserError(f"--missing {part.strip()!r}: write modality=rate, as in t1=0.2,flair=0.6") from None
        if name.strip() in rates:
            raise UserError(f"--missing names {name.strip()} twice")
        rates[name.strip()] = rate
    return rates


@dataclass(frozen=True)
class Fitted:
    """Masks that promise nothing a subject has no file of."""

    masks: dict[str, tuple[bool, ...]]
    cut: tuple[str, ...]
    """Subjects that lost a modality they were dealt."""
    kept: tuple[str, ...]
    """Subjects that have none of what they were dealt, and so keep all that they have."""


def cut_to_available(masks: Mapping[str, Sequence[bool]], available: Mapping[str, Sequence[bool]]) -> Fitted:
    """Dealt masks (K,) by subject, cut to the modalities that there are files of."""
    fitted: dict[str, tuple[bool, ...]] = {}
    cut, kept = [], []
    for name, mask in masks.items():
        both = tuple(a and b for a, b in zip(mask, available[name], strict=True))
        fitted[name] = both if any(both) else tuple(available[name])
        if not any(both):
            kept.append(name)
        elif both != tuple(mask):
            cut.append(name)
    return Fitted(fitted, tuple(cut), tuple(kept))


def read_ids(path: Path) -> list[str]:
    """Subject names, one a line. Raises `UserError` for a missing or empty list."""
    try:
        ids = path.read_text().split()
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the list of subjects ({error.strerror}); make it with `passion split`"
        ) from None
    if not ids:
        raise UserError(f"{path}: lists no subject")
    return ids
