"""Parts of a network that are cheap to run and dear to remember."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, of which the backward pass keeps the inputs alone and runs it again, dropout and all.

    On a GPU all is kept: there is memory for it, and a graph that is recorded cannot look up a generator's state.
    """
    if not torch.is_grad_enabled() or any(isinstance(x, torch.Tensor) and x.is_cuda for x in inputs):
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)
