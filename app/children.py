"""`Children`: the processes that `passion-server up` starts, watches and stops."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

POLL = 0.05


@dataclass(frozen=True)
class Child:
    """A process that leads a session of its own, so that the terminal's Ctrl-C reaches the parent alone."""

    name: str
    process: subprocess.Popen[bytes]

    def signal_group(self, number: int) -> None:
        """Signal the process and all that it started; quiet if none is left."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return


class Children:
    """Started in order, stopped in the reverse of it: those who use a thing go before it."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], pass_fds: Sequence[int] = ()
    ) -> Child:
        """Start a child. Where the kernel can (Linux), it also ends when this process is killed outright."""
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),  # our own stdout is for the one line that says where the service is
            start_new_session=True,
            pass_fds=pass_fds,
            # Unsafe beside threads only, and the parent has none.
            preexec_fn=end_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
        )
        child = Child(name, process)
        self._children.append(child)
        return child

    def ended(self) -> Child | None:
        """A child that is no longer there, if any."""
        return next((child for child in self._children if child.process.poll() is not None), None)

    def stop(self, grace: float) -> None:
        """Ask each child to end, the last started first; after `grace` seconds, kill it with all that it started."""
        for child in reversed(self._children):
            if child.process.poll() is None:
                child.process.terminate()
                end = time.monotonic() + grace
                while child.process.poll() is None and time.monotonic() < end:
                    time.sleep(POLL)
            child.signal_group(signal.SIGKILL)
            child.process.wait()
        self._children.clear()

    def kill(self) -> None:
        """End all at once."""
        for child in self._children:
            child.signal_group(signal.SIGKILL)


def end_with_parent() -> None:
    """Have the kernel (Linux) send this process SIGTERM when the process that started it is gone."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
