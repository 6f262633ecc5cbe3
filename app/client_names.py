"""`Result`: what a client can have of a job beside its mask. Imports nothing of weight, for the command line has it."""

from __future__ import annotations

from enum import StrEnum


class Result(StrEnum):
    """What there is beside a mask. Its name is its link's."""

    REPORT = "report"
    PREVIEW = "preview"
    PROBABILITIES = "probabilities"
