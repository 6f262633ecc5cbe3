"""Lanes: calls side by side, each in a thread with its share of the processor's cores.

One forward pass does not keep two cores busy: between its small operations they wait for each other. Two passes, with
a core each, do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_lanes(function: Callable[[Item], Result], items: Iterable[Item], lanes: int) -> Iterator[Result]:
    """`function` of every item, in order, up to `lanes` of them at a time.

    What torch keeps by thread (`inference_mode`, autocast) is the function's own business. What it raises is raised
    here; no call runs on when the iteration has ended, however it ends.
    """
    if lanes <= 1:
        yield from map(function, items)
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(lanes, "lane", initializer=torch.set_num_threads, initargs=(max(threads // lanes, 1),))
    under_way: deque[Future[Result]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) > lanes:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # waits for the calls under way
        torch.set_num_threads(threads)  # new threads take theirs from whoever set it last
