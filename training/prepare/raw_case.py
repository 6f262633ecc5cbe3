"""`RawCase`: one subject's files, wherever they were found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RawCase:
    """Files of one subject. `problem` says in one line why it cannot be used; None if its files look complete."""

    id: str
    folder: Path
    images: dict[str, Path]
    """By canonical modality, in task order; a modality without a file is missing."""
    labels: Path | None
    problem: str | None = None
