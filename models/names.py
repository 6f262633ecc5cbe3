"""`FileNames`: which file is which scan, told by the names that people give them.

`app/names.py` is the same below this text: `app` must not import this package. A test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

LABELS = "seg"
"""What `FileNames.read` calls the labels; no modality may have this name."""

NATIVE_T1, ENHANCED_T1 = ("t1", "t1n", "t1w"), ("t1ce", "t1c", "t1gd")
SYNONYMS = (NATIVE_T1, ENHANCED_T1, ("t2", "t2w"), ("flair", "t2f"))
"""Each contrast in BraTS before 2023 and since, and in BIDS, which writes enhanced T1 as T1w with an entity `ce-`."""

_MASK = re.compile(r"(?:.*[_-])?(?:[a-z]*seg|segm|segmentation|mask|labels?)\.nii(?:\.gz)?", re.IGNORECASE)
_NIFTI = re.compile(r".+\.nii(?:\.gz)?", re.IGNORECASE)


class FolderError(ValueError):
    """A folder whose scans cannot be told apart, or that has none. The message is one line and says what to do."""


@dataclass(frozen=True)
class Named:
    """What a file's name says."""

    subject: str
    """Empty where the name is the modality's alone."""
    what: str
    """The modality's own name, or `LABELS`."""


@dataclass(frozen=True)
class Scans:
    """A patient's scans as they were found in a folder."""

    folder: Path
    files: dict[str, Path]
    """By the modality's own name, in the model's order. Never empty."""
    left: dict[Path, str]
    """NIfTI files that are not taken, and why."""
    subjects: tuple[str, ...]
    """Whom the names of the files name: one, or none, if all is well."""

    @property
    def said(self) -> list[str]:
        """A line for every file: what it was taken for, or why not."""
        taken = [f"{what}: {path.relative_to(self.folder)}" for what, path in self.files.items()]
        return taken + [f"not taken: {path.relative_to(self.folder)} ({why})" for path, why in self.left.items()]

    @property
    def warnings(self) -> list[str]:
        """What somebody should look at."""
        if len(self.subjects) < 2:
            return []
        return [f"the files are named for {' and '.join(self.subjects)}: are they of one patient?"]


class FileNames:
    """How the files of a task are called."""

    def __init__(self, modalities: Mapping[str, Iterable[str]], labels: Iterable[str] = (LABELS,)) -> None:
        """`modalities`: own name to aliases, in the model's order. `labels`: what names of files with labels end in."""
        self._order = tuple(modalities)
        self._meaning: dict[str, str | None] = {n: m for m, others in modalities.items() for n in (m, *others)}
        self._meaning |= dict.fromkeys(labels, LABELS)
        for names in SYNONYMS:
            known = next((self._meaning[n] for n in names if n in self._meaning), None)
            self._meaning = {**dict.fromkeys(names, known), **self._meaning}
        longest_first = "|".join(sorted(map(re.escape, self._meaning), key=len, reverse=True))
        self._pattern = re.compile(rf"(?:(?P<subject>.+)[_-])?(?P<what>{longest_first})\.nii(?:\.gz)?", re.IGNORECASE)

    def read(self, name: str) -> Named | None:
        """What a file is, by `<subject>_<modality>.nii.gz` and its like; None if the name does not say."""
        match = self._pattern.fullmatch(name)
        if match is None:
            return None
        word, parts = match["what"].lower(), (match["subject"] or "").split("_")
        what = self._meaning[word]
        bare = [part for part in parts if not part.lower().startswith("ce-")]
        if bare != parts and what != LABELS:
            what = self._meaning[ENHANCED_T1[0]] if word in (*NATIVE_T1, *ENHANCED_T1) else None
        if what is None:
            return None
        if parts[0].lower().startswith("sub-"):  # BIDS: acq-, run-, space- and so on tell scans apart, not patients
            bare = [part for part in bare if part.lower().startswith(("sub-", "ses-"))]
        return Named("_".join(bare), what)

    def find(self, folder: Path) -> Scans:
        """The scans of the patient whose folder this is: in it, in `anat/`, or so in a BIDS session's `ses-<label>/`.

        Raises `FolderError` where two files claim one modality, where patients or sessions mix, or nothing is found.
        """
        taken: list[tuple[Named, Path]] = []
        left: dict[Path, str] = {}
        for path in _files(folder):
            named = self.read(path.name)
            if named is not None and named.what != LABELS:
                taken.append((named, path))
            else:
                mask = named is not None or _MASK.fullmatch(path.name)
                left[path] = "labels, no scan" if mask else "the name is of no modality of the model"
        if not taken:
            there = f"; not taken: {', '.join(path.name for path in [*left][:4])}" if left else ""
            hint = "; it holds folders: give that of one patient" if not left and _folders(folder) else there
            raise FolderError(
                f"{folder}: no scan found by name: expected ID_{self._order[0]}.nii.gz and its like "
                f"({', '.join(self._order)}){hint}"
            )
        places = dict.fromkeys(part for _, path in taken for part in path.relative_to(folder).parts[:-1])
        visits = [place for place in places if place.lower().startswith("ses-")]
        if len(visits) > 1:
            raise FolderError(f"{folder}: scans of several sessions, {' and '.join(visits)}: give the folder of one")
        subjects = tuple(dict.fromkeys(named.subject for named, _ in taken if named.subject))
        if len(subjects) > 1 and all(s.lower().startswith("sub-") for s in subjects):
            raise FolderError(f"{folder}: scans of {' and '.join(subjects)}: give a folder of one patient")
        files: dict[str, Path] = {}
        for named, path in taken:
            if named.what in files:
                both = " and ".join(str(p.relative_to(folder)) for p in (files[named.what], path))
                raise FolderError(
                    f"{folder}: two files for {named.what}: {both}; keep one, or name the scans with --image "
                    f"{named.what}=FILE and its like"
                )
            files[named.what] = path
        return Scans(folder, {m: files[m] for m in self._order if m in files}, left, subjects)


def sessions(folder: Path) -> list[Path]:
    """The folders of a BIDS patient's sessions, `ses-<label>`, sorted; none where there are no sessions."""
    return [f for f in _folders(folder) if f.name.lower().startswith("ses-")]


def _files(folder: Path) -> list[Path]:
    """NIfTI files of one patient. Raises `FolderError` for what is no folder, or cannot be read."""
    if not folder.is_dir():
        what = "is a file: give a folder, or name the scan" if folder.is_file() else "no such folder"
        raise FolderError(f"{folder}: {what}")
    try:
        places = [folder, *sessions(folder)]
        places += [inner for place in places for inner in _folders(place) if inner.name.lower() == "anat"]
        found = [p for place in places for p in place.iterdir() if _NIFTI.fullmatch(p.name) and p.is_file()]
    except OSError as error:
        raise FolderError(f"{error.filename or folder}: cannot be read ({error.strerror})") from None
    return sorted(p for p in found if not p.name.startswith("."))


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
