"""The version of this distribution."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _installed


def version() -> str:
    """As installed; `0+source` when run from a checkout that is not installed."""
    try:
        return _installed("passion-seg")
    except PackageNotFoundError:
        return "0+source"
