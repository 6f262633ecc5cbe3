"""`MissingnessTable`: which modalities each training subject is taken to have."""

from __future__ import annotations

import ast
import csv
import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.task import Task, TaskError
from training import atomic
from training.errors import UserError

Mask = tuple[bool, ...]

COLUMNS = ("data_name", "mask_id", "mask", "pos_mask_ids")

GLIOMA = ("flair", "t1ce", "t1", "t2")
"""The modalities of the released tables, in their order."""

# The released assignments number the subsets of the four glioma modalities in this order.
_GLIOMA_IDS = (
    *({"t2"}, {"t1ce"}, {"t1"}, {"flair"}),
    *({"t1ce", "t2"}, {"t1ce", "t1"}, {"flair", "t1"}, {"t1", "t2"}, {"flair", "t2"}, {"flair", "t1ce"}),
    *({"flair", "t1ce", "t1"}, {"flair", "t1", "t2"}, {"flair", "t1ce", "t2"}, {"t1ce", "t1", "t2"}),
    set(GLIOMA),
)
_PRESET_ORDER = ("t1", "t1ce", "flair", "t2")


@dataclass(frozen=True)
class MissingnessTable:
    """A presence mask per subject. `names` are the modalities, in task order; `masks` are never all False."""

    names: tuple[str, ...]
    masks: dict[str, Mask]

    @classmethod
    def read(cls, path: Path, task: Task, known: Collection[str] | None = None) -> MissingnessTable:
        """A CSV in the released format: data_name, mask_id, mask, pos_mask_ids; the two id columns may be left out.

        `known`: the subjects there are; a row for another one is an error.
        Raises `UserError` naming file, row (the header is row 1) and field.
        """
        try:
            text = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise UserError(f"{path}: cannot read the missingness table ({error.strerror})") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: not a text file; give a CSV with the columns {', '.join(COLUMNS)}") from None
        try:
            rows = list(csv.DictReader(io.StringIO(text, newline=""), restkey="more", strict=True))
        except csv.Error as error:
            raise UserError(f"{path}: not a readable CSV ({error})") from None
        absent = [c for c in ("data_name", "mask") if not rows or rows[0].get(c) is None]
        if absent:
            raise UserError(f"{path}: no column {absent[0]} or no row; the columns are {', '.join(COLUMNS)}")
        ids = mask_ids(task)
        masks: dict[str, Mask] = {}
        for number, row in enumerate(rows, start=2):
            where = f"{path}, row {number}"
            name = (row["data_name"] or "").strip()
            if not name:
                raise UserError(f"{where}, data_name: empty")
            if name in masks:
                raise UserError(f"{where}, data_name: {name} has a row already; keep one")
            if known is not None and name not in known:
                raise UserError(f"{where}, data_name: {name} is no subject of the data set")
            masks[name] = _check_row(where, row, task, ids)
        return cls(task.names, masks)

    def write(self, path: Path) -> None:
        """Write the released CSV format, whole or not at all."""
        ids = _ids(self.names)
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(COLUMNS)
        for name, mask in self.masks.items():
            writer.writerow([name, ids[mask], list(mask), sub_subset_ids(mask, ids)])
        atomic.write_text(path, text.getvalue())

    def rates(self) -> dict[str, float]:
        """The realised missing rate of each modality."""
        total = len(self.masks)
        return {n: sum(not m[k] for m in self.masks.values()) / total for k, n in enumerate(self.names)}

    def counts(self) -> dict[Mask, int]:
        """Subjects per subset, by mask id; every subset is listed."""
        found = dict.fromkeys(_ids(self.names), 0)
        for mask in self.masks.values():
            found[mask] += 1
        return found


def modality_weights(table: MissingnessTable) -> dict[str, float]:
    """N / N_k: subjects over subjects that have modality k. Raises `UserError` where none has it."""
    total = len(table.masks)
    weights = {}
    for k, name in enumerate(table.names):
        having = sum(mask[k] for mask in table.masks.values())
        if not having:
            raise UserError(
                f"no subject of the missingness table has {name}: lower its missing rate, or take it out of the task "
                "if there are no files of it"
            )
        weights[name] = total / having
    return weights


def assign(ids: Sequence[str], rates: Mapping[str, float], task: Task, seed: int) -> MissingnessTable:
    """Masks drawn once for `ids`: independent missing rates, conditioned on not everything being missing.

    `rates`: missing rate in [0, 1) by modality (aliases accepted; one not named is never missing). The expected number
    of subjects per subset is apportioned by largest remainder, then mended so that every modality's total is within
    one subject of its expectation and at least one subject has it; `seed` decides who gets which subset. The result
    depends on the set of ids, not on their order. Raises `UserError` for rates or ids that cannot be.
    """
    if not ids:
        raise UserError("there is no subject to assign modalities to")
    if len(set(ids)) != len(ids):
        raise UserError("a subject is listed twice")
    by_name = dict.fromkeys(task.names, 0.0)
    for given, rate in rates.items():
        try:
            name = task.canonical(given)
        except TaskError as error:
            raise UserError(f"missing rate: {error}") from None
        if not 0 <= rate < 1:
            raise UserError(f"missing rate {given}={rate:g}: must be at least 0 and below 1")
        by_name[name] = rate
    subsets = list(mask_ids(task))
    counts = apportion(len(ids), np.array([by_name[n] for n in task.names]), subsets)
    dealt = [mask for mask, count in zip(subsets, counts, strict=True) for _ in range(count)]
    order = np.random.default_rng(seed).permutation(len(ids))
    return MissingnessTable(task.names, {name: dealt[place] for name, place in zip(sorted(ids), order, strict=True)})


def expected_shares(rates: Any, subsets: Sequence[Mask]) -> Any:
    """Probability of each subset (S,) under independent missing `rates` (K,), given that not all are missing."""
    present, rates = np.array(subsets), np.asarray(rates, float)
    chance = np.where(present, 1 - rates, rates).prod(axis=1)
    return chance / chance.sum()


def apportion(total: int, rates: Any, subsets: Sequence[Mask]) -> list[int]:
    """Subjects per subset, summing to `total`; see `assign` for what is promised."""
    present = np.array(subsets)
    quota = total * expected_shares(rates, subsets)
    counts = np.floor(quota + 1e-9).astype(int)
    by_remainder = np.argsort(counts - quota, kind="stable")
    counts[by_remainder[: total - counts.sum()]] += 1
    # Fifteen small roundings can add up to more than one subject for a modality, or leave it nobody: move single
    # subjects to the neighbouring subset that differs in this modality alone, where the counts suffer least.
    wanted = present.T @ quota
    for k in range(present.shape[1]):
        while (excess := counts @ present[:, k] - wanted[k]) >= 1 - 1e-9:
            if not _move(counts, quota, subsets, k, gain=False):
                break
        while excess <= -1 + 1e-9 or counts @ present[:, k] == 0:
            _move(counts, quota, subsets, k, gain=True)
            excess = counts @ present[:, k] - wanted[k]
    return [int(c) for c in counts]


def _move(counts: Any, quota: Any, subsets: Sequence[Mask], k: int, *, gain: bool) -> bool:
    place = {mask: i for i, mask in enumerate(subsets)}
    best: tuple[float, int, int] | None = None
    for source, mask in enumerate(subsets):
        target = place.get((*mask[:k], gain, *mask[k + 1 :]))
        if mask[k] == gain or target is None or not counts[source]:
            continue
        worse = (quota[source] - counts[source]) + (counts[target] - quota[target])
        if best is None or worse < best[0] - 1e-9:
            best = (worse, source, target)
    if best is None:
        return False
    counts[best[1]] -= 1
    counts[best[2]] += 1
    return True


def preset(name: str, task: Task) -> dict[str, float]:
    """Missing rates of a published imbalance: `mr2468` is t1 0.2, t1ce 0.4, flair 0.6, t2 0.8. Raises `UserError`."""
    if set(task.names) != set(_PRESET_ORDER):
        raise UserError(f"presets such as mr2468 are for t1, t1ce, flair and t2; task {task.name} needs --missing")
    digits = re.fullmatch(r"mr(\d{4})", name)
    if digits is None:
        raise UserError(
            f"preset {name!r}: write mr and four digits, the missing rates of t1, t1ce, flair, t2 in tenths"
        )
    return {n: int(d) / 10 for n, d in zip(_PRESET_ORDER, digits[1], strict=True)}


def mask_ids(task: Task) -> dict[Mask, int]:
    """The number of every non-empty subset, in order of the numbers.

    The four glioma modalities in their order have the numbers of the released tables. Subsets of any other task are
    numbered by size and then in task order, as `Task.subsets` lists them.
    """
    return _ids(task.names)


def sub_subset_ids(mask: Mask, ids: Mapping[Mask, int]) -> list[int]:
    """Numbers of all non-empty subsets of `mask`, itself included, ascending."""
    return sorted(i for other, i in ids.items() if all(b or not a for a, b in zip(other, mask, strict=True)))


def _ids(names: tuple[str, ...]) -> dict[Mask, int]:
    if names == GLIOMA:
        return {tuple(n in subset for n in names): i for i, subset in enumerate(_GLIOMA_IDS)}
    count = len(names)
    masks = [tuple(bool(bits >> (count - 1 - k) & 1) for k in range(count)) for bits in range(1, 2**count)]
    masks.sort(key=lambda m: (sum(m), tuple(not p for p in m)))
    return {mask: i for i, mask in enumerate(masks)}


def _check_row(where: str, row: Mapping[str, Any], task: Task, ids: Mapping[Mask, int]) -> Mask:
    if row.get("more"):
        raise UserError(f'{where}: more fields than columns; quote lists, as in "[True, False]"')
    mask = _list(where, "mask", row["mask"])
    if len(mask) != len(task.names):
        order = ", ".join(task.names)
        raise UserError(f"{where}, mask: {len(mask)} entries for {len(task.names)} modalities ({order})")
    if not all(isinstance(p, bool) for p in mask):
        raise UserError(f"{where}, mask: entries must be True or False, not {row['mask']}")
    if not any(mask):
        raise UserError(f"{where}, mask: every modality is missing; a subject needs one")
    checked = tuple(mask)
    if row.get("mask_id") is not None:
        wanted = ids[checked]
        if row["mask_id"].strip() != str(wanted):
            there = "+".join(n for n, has in zip(task.names, checked, strict=True) if has)
            raise UserError(f"{where}, mask_id: {row['mask_id']!r}, but the mask ({there}) is number {wanted}")
    if row.get("pos_mask_ids") is not None:
        subsets = sub_subset_ids(checked, ids)
        if _list(where, "pos_mask_ids", row["pos_mask_ids"]) != subsets:
            raise UserError(f"{where}, pos_mask_ids: {row['pos_mask_ids']}, but the mask's subsets are {subsets}")
    return checked


def _list(where: str, field: str, text: str | None) -> list[Any]:
    try:
        # A literal, not an expression: the file may come from anywhere.
        value = ast.literal_eval((text or "")[:1_000_000])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise UserError(f"{where}, {field}: {(text or '')[:60]!r} is not a list such as [True, False]")
    return value
