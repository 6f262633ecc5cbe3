"""`Line`: where a job waits. There is one for each model and each kind of device that it needs, so that a worker takes
what it can do, and in each of them jobs of two priorities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from app.jobs.record import Job

Needs = Literal["any", "cuda", "cpu"]
"""What a model is to run on."""
NEEDS: tuple[Needs, ...] = get_args(Needs)
Priority = Literal["interactive", "batch"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)

STEPS: dict[Priority, int] = {"interactive": 0, "batch": 5}
"""As Celery's Redis transport has them: of all lines of a worker, what has the least number comes first."""
SEPARATOR = "\x06\x16"
"""Between a queue's name and a step in the name of a list in Redis; kombu's own default."""
BEFORE = "passion"
"""The one queue that older versions sent all jobs to. Workers empty it, so that an upgrade loses nothing."""
ON = {"any": "", "cuda": " on a GPU", "cpu": " on a CPU"}


@dataclass(frozen=True)
class Line:
    """The jobs of one model that need the same kind of device."""

    needs: Needs
    model: str

    @classmethod
    def of(cls, job: Job) -> Line:
        """The one in which a job waits."""
        return cls(job.needs, job.model)

    @property
    def queue(self) -> str:
        """What Celery calls it."""
        return f"passion.{self.needs}.{self.model}"

    @property
    def server(self) -> str:
        """Who could take its jobs, in words."""
        return f"a worker that serves {self.model}{ON[self.needs]}"


def lists(queue: str) -> list[str]:
    """The lists in Redis that a queue is, by priority."""
    return [queue if step == 0 else f"{queue}{SEPARATOR}{step}" for step in STEPS.values()]
