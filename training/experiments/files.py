"""Definition files: those that come with the package, and one's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from models.task import first_problem
from training.errors import UserError
from training.experiments.checks import plain, problems
from training.experiments.definition import Definition

SHIPPED = Path(__file__).parent


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
        raise UserError(f"{path}: {plain(first_problem(error))}") from None
    for problem in problems(definition):
        raise UserError(f"{path}: {problem}")
    return definition


def _merge(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `content`, level by level; lists are replaced whole."""
    merged = dict(content)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


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
