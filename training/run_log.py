"""`RunLog`: what a training run tells: a JSON line and TensorBoard scalars per epoch."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from training import atomic


class RunLog:
    """Appends to `out/log.jsonl` and `out/tensorboard/`. A resumed run drops what it will do again."""

    def __init__(self, out: Path, first_epoch: int) -> None:
        self._path = out / "log.jsonl"
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _epoch(line) < first_epoch]
            atomic.write_text(self._path, "".join(line + "\n" for line in kept))
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first_epoch)

    def epoch(self, record: dict[str, Any]) -> None:
        """One epoch's figures; nested dictionaries become groups of scalars."""
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if isinstance(value, dict):
                for key, entry in value.items():
                    self._board.add_scalar(f"{name}/{key}", entry, record["epoch"])
            elif name != "epoch":
                self._board.add_scalar(name, value, record["epoch"])
        self._board.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._board.close()


def _epoch(line: str) -> float:
    try:
        return float(json.loads(line)["epoch"])
    except (ValueError, KeyError):
        return float("inf")  # a line cut off by a kill
