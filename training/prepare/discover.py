"""Subjects in a folder of scans: named as BraTS or BIDS names them, or in nnU-Net's layout."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from models.task import RESERVED, Task
from training.errors import UserError
from training.prepare.nnunet import find_cases as find_nnunet_cases
from training.prepare.nnunet import is_nnunet
from training.prepare.raw_case import RawCase


@dataclass
class _Found:
    folder: Path
    files: dict[str, list[Path]] = field(default_factory=dict)
    """By canonical modality, and `seg` for labels."""


def find_cases(source: Path, task: Task) -> list[RawCase]:
    """Every subject under `source`, by id.

    Reads nnU-Net's layout where `source` has its dataset.json (`training.prepare.nnunet`), else
    `<id>_<modality>.nii.gz` and `<id>-<modality>.nii`, in any case, under any alias of the task, at any depth (HGG and
    LGG folders included), BIDS's names (`models.names`), and `<modality>.nii.gz` in a folder named for the subject.
    Labels have a suffix of the task's `label_suffixes`, and may lie in a folder of their own. Other files are no
    concern of ours. Raises `UserError` where nothing is found.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    if is_nnunet(source):
        return find_nnunet_cases(source, task)
    found: dict[tuple[Path, str], _Found] = {}
    odd_labels: dict[Path, list[Path]] = {}
    for folder, names in _walk(source):
        for name in names:
            named = task.file_names.read(name)
            if named:
                case = named.subject or folder.resolve().name
                files = found.setdefault((folder, case), _Found(folder)).files
                files.setdefault(named.what, []).append(folder / name)
            elif re.fullmatch(r".*[_-]segm\.nii(\.gz)?", name, re.IGNORECASE):
                odd_labels.setdefault(folder, []).append(folder / name)
    if not found:
        raise UserError(
            f"{source}: no scans found; expected <id>/<id>_{task.names[0]}.nii.gz and its like "
            f"({', '.join((*task.names, task.label_suffixes[0]))}), or nnU-Net's dataset.json"
        )
    _adopt_odd_labels(found, odd_labels)
    by_id: dict[str, list[_Found]] = {}
    for (_, case), place in sorted(found.items(), key=lambda item: (item[0][1], str(item[0][0]))):
        by_id.setdefault(case, []).append(place)
    return [_case(name, _join(places), task) for name, places in sorted(by_id.items())]


def _walk(source: Path) -> list[tuple[Path, list[str]]]:
    visited: set[str] = set()
    folders = []
    for root, subfolders, names in os.walk(source, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:  # a link back up would never end
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(s for s in subfolders if not s.startswith((".", "__MACOSX")))
        folders.append((Path(root), sorted(n for n in names if not n.startswith("."))))
    return folders


def _adopt_odd_labels(found: dict[tuple[Path, str], _Found], odd_labels: dict[Path, list[Path]]) -> None:
    """BraTS 2020's case 355 has its labels as `W39_1998.09.19_Segm.nii`: taken where nothing else can be meant."""
    for folder, files in odd_labels.items():
        here = [case for (where, _), case in found.items() if where == folder]
        if len(here) == 1 and RESERVED not in here[0].files and len(files) == 1:
            here[0].files[RESERVED] = files


def _join(places: list[_Found]) -> list[_Found]:
    """One place where a subject's images lie in one folder and its labels in another, as in MyoPS 2020."""
    if len(places) != 2:
        return places
    labels, images = sorted(places, key=lambda place: set(place.files) != {RESERVED})
    if set(labels.files) != {RESERVED} or RESERVED in images.files:
        return places
    return [_Found(images.folder, images.files | labels.files)]


def _case(name: str, places: list[_Found], task: Task) -> RawCase:
    files = places[0].files
    images = {m: files[m][0] for m in task.names if m in files}
    labels = files[RESERVED][0] if RESERVED in files else None
    twice = next((what for what in (*task.names, RESERVED) if len(files.get(what, [])) > 1), None)
    problem = None
    if len(places) > 1:
        problem = f"two folders hold it: {places[0].folder} and {places[1].folder}; keep one"
    elif twice is not None:
        problem = f"two files for {twice}: {' and '.join(p.name for p in files[twice][:2])}; keep one"
    elif not images:
        problem = f"no modality, only labels; expected one of {', '.join(task.names)}"
    elif labels is None:
        suffix = task.label_suffixes[0]
        problem = f"no segmentation; expected {name}_{suffix}.nii.gz or {name}-{suffix}.nii.gz"
    return RawCase(name, places[0].folder, images, labels, problem)
