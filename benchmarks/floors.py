"""What a machine can do at best: bytes it moves and operations it computes in a second, and what a step asks for."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from models import triton_kernels

COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
SIDE = {"cuda": 8192, "cpu": 2048}
"""Of the matrices that are multiplied."""
TIMES = 5
KERNELS = ("norm_act", "norm_act_backward", "padded", "unpadded")
"""Of our own, whose operations torch does not see."""


class Traffic(TorchDispatchMode):
    """While active, adds up what every operation reads and writes, each tensor once per operation, and computes.

    Views cost nothing. It is what the operations move as they are: fewer, fused ones would move less. What kernels of
    our own have inside, the sums of parts of a volume, is not seen; their volumes are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.flops = 0
        """Of convolutions and products of matrices; a multiplication and an addition are two."""
        self._kernels: dict[str, Any] = {}

    def __enter__(self) -> Traffic:
        for name in KERNELS:
            self._kernels[name] = getattr(triton_kernels, name)
            setattr(triton_kernels, name, partial(self._counted, self._kernels[name]))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, kernel in self._kernels.items():
            setattr(triton_kernels, name, kernel)

    def _counted(self, kernel: Any, *arguments: Any) -> Any:
        before = self.bytes
        result = kernel(*arguments)
        tensors = [t for t in tree_leaves((arguments, result)) if isinstance(t, Tensor)]
        self.bytes = before + sum(t.numel() * t.element_size() for t in tensors)
        return result

    def __torch_dispatch__(
        self, operation: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation; take its inputs and outputs down."""
        result = operation(*args, **(kwargs or {}))
        if not operation.is_view:
            tensors = {id(t): t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}
            self.bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        if operation.overloadpacket in flop_registry:
            self.flops += flop_registry[operation.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy within the device's memory reads and writes."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device.type] / _best(lambda: target.copy_(source), device)


def rate(device: torch.device, precision: str) -> float:
    """Floating-point operations a second of a large product of matrices; a multiplication and an addition are two."""
    side = SIDE[device.type]
    a = torch.randn(side, side, device=device, dtype=getattr(torch, precision))
    return 2 * side**3 / _best(lambda: a @ a, device)


def _best(function: Any, device: torch.device) -> float:
    seconds = []
    for _ in range(TIMES + 1):  # the first is not the best
        begun = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return min(seconds)
