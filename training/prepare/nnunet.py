"""nnU-Net's raw layout: dataset.json, `imagesTr/<case>_0000.nii.gz` per channel, `labelsTr/<case>.nii.gz`.

Both versions of dataset.json are read, as https://github.com/MIC-DKFZ/nnUNet documents them: channels in
`channel_names` (version 2) or `modality` (version 1), cases found by name, or listed in `dataset` (version 2) or
`training` (version 1). A channel is a modality of the task by name or alias; a channel's file that is not there is a
missing modality.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.task import Task
from training.errors import UserError
from training.prepare.raw_case import RawCase

DATASET, IMAGES, LABELS = "dataset.json", "imagesTr", "labelsTr"
ENDINGS = (".nii.gz", ".nii")
EXAMPLE = '{"channel_names": {"0": "T2", "1": "ADC"}, "labels": {"background": 0, "PZ": 1}, "file_ending": ".nii.gz"}'


@dataclass
class _Files:
    channels: dict[int, Path] = field(default_factory=dict)
    """By channel number; a channel without a file is not here."""
    labels: Path | None = None
    unsplit: Path | None = None
    """An image that says no channel."""


@dataclass(frozen=True)
class _Listed:
    images: tuple[str | None, ...]
    """By channel; None or a file that is not there: missing."""
    labels: str


@dataclass(frozen=True)
class _Description:
    path: Path
    channels: dict[int, str]
    labels: dict[str, tuple[int, ...]]
    """Values by name; several for a region."""
    ending: str
    listed: dict[str, _Listed]
    """By case; empty where cases are found by name."""


def is_nnunet(source: Path) -> bool:
    """Whether a folder is laid out as nnU-Net's raw data sets; what `passion prepare` wrote is not."""
    path = source / DATASET
    if not path.is_file():
        return False
    if (source / IMAGES).is_dir():
        return True
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and not content.keys().isdisjoint({"channel_names", "modality"})


def find_cases(source: Path, task: Task) -> list[RawCase]:
    """Every training case, by id.

    Raises `UserError` for a dataset.json that cannot be read, channels that are not the task's, labels that mean
    something else than the task's, or where there is no case.
    """
    description = _read(source / DATASET)
    modalities = _modalities(description, task)
    _check_labels(description, task)
    files = _listed(source, description) if description.listed else _by_name(source, description.ending)
    if not files:
        raise UserError(
            f"{source}: no case found; expected {IMAGES}/<case>_0000{description.ending} and its like, and "
            f"{LABELS}/<case>{description.ending}"
        )
    return [_case(name, source, files[name], modalities, task, description.ending) for name in sorted(files)]


def _case(name: str, source: Path, files: _Files, modalities: Mapping[int, str], task: Task, ending: str) -> RawCase:
    by_modality = {modalities[c]: path for c, path in files.channels.items() if c in modalities}
    images = {m: by_modality[m] for m in task.names if m in by_modality}
    strange = next((path.name for c, path in files.channels.items() if c not in modalities), None)
    problem = None
    if files.unsplit is not None:
        problem = (
            f"{files.unsplit.name} has no channel number (a 4-D file of the Medical Segmentation Decathlon?): split it "
            f"into {name}_0000{ending}, {name}_0001{ending}, ... (nnUNetv2_convert_MSD_dataset does)"
        )
    elif strange is not None:
        problem = f"{strange}: {DATASET} has no such channel; it numbers {', '.join(map(str, modalities))}"
    elif not images:
        problem = f"no modality, only labels; expected {IMAGES}/{name}_0000{ending} or another channel"
    elif files.labels is None:
        problem = f"no segmentation; expected {LABELS}/{name}{ending}"
    return RawCase(name, source, images, files.labels, problem)


def _by_name(source: Path, ending: str) -> dict[str, _Files]:
    cases = {path.name.removesuffix(ending): _Files(labels=path) for path in _images(source / LABELS, ending)}
    labelled = set(cases)
    for path in _images(source / IMAGES, ending):
        stem = path.name.removesuffix(ending)
        numbered = re.fullmatch(r"(.+)_(\d{4})", stem)
        if numbered is None or stem in labelled:
            cases.setdefault(stem, _Files()).unsplit = path
        else:
            cases.setdefault(numbered[1], _Files()).channels[int(numbered[2])] = path
    return cases


def _listed(source: Path, description: _Description) -> dict[str, _Files]:
    cases = {}
    for name, entry in description.listed.items():
        files = {c: source / image for c, image in enumerate(entry.images) if image is not None}
        labels, bare = source / entry.labels, source / IMAGES / f"{name}{description.ending}"
        cases[name] = _Files(
            {c: path for c, path in files.items() if path.is_file()},
            labels if labels.is_file() else None,
            bare if bare.is_file() and bare not in files.values() else None,
        )
    return cases


def _images(folder: Path, ending: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.endswith(ending) and not p.name.startswith("."))


def _modalities(description: _Description, task: Task) -> dict[int, str]:
    """The task's modality of each channel."""
    known = {_squashed(n): m.name for m in task.modalities for n in (m.name, *m.aliases)}
    found: dict[int, str] = {}
    for channel, name in description.channels.items():
        modality = known.get(_squashed(name))
        if modality is None:
            raise UserError(
                f"{description.path}: channel {channel} ({name}) is no modality of task {task.name}: it has "
                f"{', '.join(task.names)}; name the task with --task, or make {name} an alias in its YAML"
            )
        twin = next((c for c, m in found.items() if m == modality), None)
        if twin is not None:
            raise UserError(
                f"{description.path}: channels {twin} and {channel} are both {modality} of task {task.name}"
            )
        found[channel] = modality
    return found


def _check_labels(description: _Description, task: Task) -> None:
    """Raises `UserError` for values that are not the task's, or that the task knows by another name."""
    classes = {v: i for i, label in enumerate(task.labels) for v in (label.value, *label.also_read)}
    meant = {_plain(name): set(region.labels) for region in task.regions for name in (region.name, region.description)}
    meant |= {_plain(label.name): {i} for i, label in enumerate(task.labels)}
    for name, values in description.labels.items():
        foreign = next((v for v in values if v not in classes), None)
        if foreign is not None:
            raise UserError(
                f"{description.path}: labels: {name} has the value {foreign}, which is not of task {task.name}: it "
                f"reads {sorted(classes)}; name the task with --task, or write one for these labels (docs/tasks.md)"
            )
        wanted = meant.get(_plain(name))
        if wanted is not None and {classes[v] for v in values} != wanted:
            there = ", ".join(str(task.labels[i].value) for i in sorted(wanted))
            raise UserError(
                f"{description.path}: labels: {name} is {', '.join(map(str, values))} here and {there} in task "
                f"{task.name}: the values mean something else; write a task for these labels (docs/tasks.md)"
            )


def _squashed(name: str) -> str:
    """A channel's name as far as it tells modalities apart: `T1-Gd` is t1gd."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _plain(name: str) -> str:
    """A label's name without what spellings differ in: edema is oedema, tumor is tumour."""
    return _squashed(name).replace("oe", "e").replace("our", "or")


def _read(path: Path) -> _Description:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); write it as {EXAMPLE}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object; write it as {EXAMPLE}")
    first_version = "channel_names" not in content and "modality" in content
    ending = content.get("file_ending", ENDINGS[0])
    if ending not in ENDINGS:
        raise UserError(f"{path}: file_ending {ending!r}: only NIfTI is read; convert the images to .nii.gz")

    def part(name: str, read: Callable[[Any], Any], optional: bool = False) -> Any:
        if not content.get(name):
            if optional:
                return {}
            raise UserError(f"{path}: has no {name}; write it as {EXAMPLE}")
        try:
            return read(content[name])
        except (TypeError, ValueError, AttributeError, KeyError):
            raise UserError(f"{path}: {name} is not as nnU-Net writes it; write it as {EXAMPLE}") from None

    if first_version:
        channels = part("modality", _channels)
        labels = part("labels", lambda value: {str(name): (int(v),) for v, name in value.items()}, optional=True)
        listed = part("training", lambda value: _training(value, max(channels) + 1), optional=True)
    else:
        channels = part("channel_names", _channels)
        labels = part("labels", _labels, optional=True)
        listed = part("dataset", _mapping, optional=True)
    unsafe = next((name for name in listed if Path(name).name != name or name.startswith(".")), None)
    if unsafe is not None:  # a case's name becomes a folder's
        raise UserError(f"{path}: {unsafe!r} is no name for a case; leave out folders and a leading dot")
    return _Description(path, channels, labels, ending, listed)


def _channels(value: Any) -> dict[int, str]:
    return dict(sorted((int(number), str(name)) for number, name in value.items()))


def _labels(value: Any) -> dict[str, tuple[int, ...]]:
    return {str(name): tuple(map(int, v)) if isinstance(v, list) else (int(v),) for name, v in value.items()}


def _training(value: Any, channels: int) -> dict[str, _Listed]:
    """Version 1 lists an image without its channels' numbers."""
    found = {}
    for entry in value:
        image, ending = _split_ending(entry["image"])
        labels = str(entry["label"])
        images = tuple(f"{image}_{c:04d}{ending}" for c in range(channels))
        found[Path(_split_ending(labels)[0]).name] = _Listed(images, labels)
    return found


def _mapping(value: Any) -> dict[str, _Listed]:
    return {
        str(name): _Listed(tuple(None if i is None else str(i) for i in entry["images"]), str(entry["label"]))
        for name, entry in value.items()
    }


def _split_ending(name: str) -> tuple[str, str]:
    ending = next((e for e in ENDINGS if name.endswith(e)), None)
    if ending is None:
        raise ValueError(name)
    return name.removesuffix(ending), ending
