"""`JobProgress`: a job's way on the terminal."""

from __future__ import annotations

from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class JobProgress:
    """Two bars on standard error: bytes sent, then the job's own per cent."""

    def __init__(self, size: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._upload = self._progress.add_task("sending", total=size)
        self._job = self._progress.add_task("waiting", total=100, start=False, visible=False)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the terminal to others."""
        self._progress.stop()

    def sent(self, count: int) -> None:
        """That many more bytes were sent."""
        self._progress.advance(self._upload, count)

    def accepted(self) -> None:
        """The service took the images."""
        self._progress.update(self._upload, description="sent")
        self._progress.update(self._job, visible=True)
        self._progress.start_task(self._job)

    def job(self, job: dict[str, Any]) -> None:
        """The job as the service describes it."""
        text = job["stage"] or job["state"]
        if job["state"] == "queued" and job["position"]:
            text = f"queued, number {job['position']}"
        self._progress.update(self._job, completed=job["percent"], description=text)
