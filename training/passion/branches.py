"""`Branches`: paths that do not depend on each other, side by side on a GPU.

One path of one sample is thousands of small operations, most of which leave a GPU nearly empty. On streams of their own
they share it; in a CUDA graph that becomes its branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def in_turn(paths: Sequence[Callable[[], T]], then: Callable[[T], None]) -> None:
    """Run one after the other, and do with each what is to be done then."""
    for path in paths:
        then(path())


class Branches:
    """As `in_turn`, at the same time: `Branches(device, number)(paths, then)`.

    Each path has a stream, always the same for its place, which starts from the current one and is waited for there.
    What a path leaves to others goes through `then`, which is called after all; so paths may read the same tensors, and
    write their own. Memory is a stream's own: what is read here and was made elsewhere must live until `then`.
    """

    def __init__(self, device: torch.device, number: int) -> None:
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(number)]
        # A weight's gradients come from several streams, which torch waits for, and warns of.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)

    def __call__(self, paths: Sequence[Callable[[], T]], then: Callable[[T], None]) -> None:
        """Run the paths, and then `then` with what each gave, in order."""
        if len(paths) < 2:
            in_turn(paths, then)
            return
        here, streams = torch.cuda.current_stream(self._device), self._streams[: len(paths)]
        found = []
        # Before any path: its backward pass hands gradients over to the current stream, for which others would wait.
        for stream in streams:
            stream.wait_stream(here)
        for stream, path in zip(streams, paths, strict=True):
            with torch.cuda.stream(stream):
                found.append(path())
        for stream in streams:
            here.wait_stream(stream)
        for each in found:
            then(each)


Apart = Callable[[Sequence[Callable[[], Any]], Callable[[Any], None]], None]
"""`in_turn` or `Branches`."""
