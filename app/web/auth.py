"""Who is asking."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends


def caller() -> str:
    """The id of the caller's key; empty where the service asks for none."""
    return ""


Caller = Annotated[str, Depends(caller)]
