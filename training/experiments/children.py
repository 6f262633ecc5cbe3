"""`Child`: a command of `passion` in a process that never outlives the experiment."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

_PR_SET_PDEATHSIG = 1
# Looked up here, not between fork and exec, where little may be done.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


class Child:
    """`passion` with arguments, its output appended to a file; it leads a process group of its own.

    SIGTERM lets a training run save. Linux sends it too when the parent is killed outright.
    """

    def __init__(self, arguments: Sequence[str], output: Path, threads: int, keep_open: int | None = None) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        self.output = output
        parent = os.getpid()
        with output.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "training", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(threads, os.environ),
                start_new_session=True,
                pass_fds=() if keep_open is None else (keep_open,),
                preexec_fn=partial(_end_with, parent) if _PRCTL is not None else None,  # noqa: PLW1509  # we start no thread
            )

    def ended(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._process.poll()

    def wait(self, seconds: float | None = None) -> int:
        """The exit status, waited for. Raises `subprocess.TimeoutExpired`."""
        return self._process.wait(seconds)

    def terminate(self) -> None:
        """Ask it to save and end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it with all that it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def last_words(self) -> str:
        """The last line that it printed: its error message, if it failed."""
        lines = self.output.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else "no output"

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return


def _environment(threads: int, ours: Mapping[str, str]) -> dict[str, str]:
    # Passive: threads that wait do not take the cores from the other jobs.
    return {
        **ours,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "160",
    }


def _end_with(parent: int) -> None:
    assert _PRCTL is not None
    _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # gone before we asked
        os._exit(1)
