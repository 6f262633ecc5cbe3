"""`Footprint`: what a backbone costs: parameters, memory, arithmetic. Computed without data, or measured for real."""

from __future__ import annotations

import multiprocessing
import sys
import weakref
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from models.backbone import Mask
from models.backbones import build
from models.layout import in_fast_layout
from models.task import Task
from training.errors import UserError
from training.passion.objective import Coefficients
from training.passion.staged import staged

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Memory:
    """Bytes that one patch takes at the worst moment, the weights included."""

    step: int
    """One PASSION training step (batch 1) after the first: with gradients and AdamW's three moments."""
    window: int
    """One inference window."""


@dataclass(frozen=True)
class Footprint:
    """What a backbone costs for a task, a width and the modalities present."""

    parameters: int
    """All, those that only training needs included."""
    inference_parameters: int
    """Those that `encode` and `fuse` read when every modality is present."""
    flops: int
    """Floating-point operations of one inference window; a multiplication and an addition are two."""
    memory: Memory


class Ledger(TorchDispatchMode):
    """While active, counts the bytes of all tensors alive, operation by operation, and notes which were read.

    Tensors without data (device `meta`) count as much as real ones. What an operation takes for itself and gives back
    before it returns is not seen.
    """

    def __init__(self, *existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._counted: set[int] = set()
        self._read: set[int] = set()
        for tensors in existing:
            for tensor in tensors:
                self._count(tensor)

    def was_read(self, tensor: Tensor) -> bool:
        """Whether any operation had the tensor, or a view of it, as its input."""
        return tensor.untyped_storage()._cdata in self._read

    def __torch_dispatch__(
        self, operation: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation; take its inputs and outputs down."""
        given = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        self._read.update(t.untyped_storage()._cdata for t in inputs)
        if operation is torch.ops.aten.nonzero.default and inputs[0].is_meta:
            return torch.ones(inputs[0].shape).nonzero()  # without data, take the most there can be
        result = operation(*args, **given)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._counted:
            self._counted.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self._read.discard(key)
        self.alive -= size


class Patch:
    """A fresh network with its optimiser, and one random patch for it to run on."""

    def __init__(self, name: str, task: Task, width: int, device: str) -> None:
        self.classes = len(task.labels)
        self.network: Any = build(name, task, width).to(device)
        with torch.device(device):
            self.x = in_fast_layout(torch.randn(1, len(task.names), *task.patch_size))
            # Slabs, so that every class is there.
            slabs = torch.arange(task.patch_size[0]) * self.classes // task.patch_size[0]
            self.labels = slabs[None, :, None, None].expand(1, *task.patch_size).contiguous()
            self.ones = torch.ones(len(task.names))

    def window(self, mask: Mask) -> None:
        """What the predictor does with a window."""
        with torch.inference_mode():
            self.network.fuse(self.network.encode(self.x, mask), mask).logits.softmax(1)

    def step(self, mask: Mask) -> None:
        """What the trainer does with a batch of one sample, up to the optimiser's step."""
        self.network.zero_grad()
        ones = torch.ones(len(mask))  # with data, wherever the rest is: as if all modalities lagged, which costs most
        everything = Coefficients(ones, ones, ones)
        parameters = list(self.network.parameters())
        _, gradients = staged(
            self.network, parameters, self.x, self.labels, [mask], self.classes, lambda _losses: everything
        )
        for i, gradient in gradients.items():
            parameters[i].grad = gradient


def footprint(name: str, task: Task, width: int, mask: Mask) -> Footprint:
    """Computed on torch's `meta` device, where tensors have shapes but no data: seconds for any patch size.

    Raises ValueError for an unknown backbone, or a width or patch size that does not fit it.
    """
    patch = Patch(name, task, width, "meta")
    weights, buffers = list(patch.network.parameters()), list(patch.network.buffers())
    flops = FlopCounterMode(display=False)
    with Ledger(weights, buffers, [patch.x]) as window, flops:
        patch.window(mask)
    # A modality that is missing here has an encoder too.
    inference = window if all(mask) else Ledger()
    if inference is not window:
        with inference:
            patch.window([True] * len(mask))
    moments = [torch.empty_like(weight) for weight in weights for _ in range(3)]
    for weight in weights:
        weight.grad = torch.empty_like(weight)  # of the step before
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    with Ledger(weights, buffers, [patch.x, patch.labels], moments, gradients) as step:
        del gradients
        patch.step(mask)
    return Footprint(
        parameters=sum(p.numel() for p in weights),
        inference_parameters=sum(p.numel() for p in weights if inference.was_read(p)),
        flops=flops.get_total_flops(),
        memory=Memory(step.peak, window.peak),
    )


def measure(name: str, task: Task, width: int, mask: Mask, device: str) -> Memory:
    """Measured in a process of its own: the most that torch had allocated on a GPU, or that the process grew by.

    Raises ValueError as `footprint` does, and `UserError` if memory runs out.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(_measure, name, task, width, tuple(mask), device).result()
        except (BrokenProcessPool, torch.OutOfMemoryError):
            raise UserError(f"measuring {name} ended for want of memory: try a smaller --crop") from None


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch had allocated on a GPU, or that this process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():  # Linux counts what the parent process had into `ru_maxrss`, but not into this
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _measure(name: str, task: Task, width: int, mask: tuple[bool, ...], device: str) -> Memory:
    where = torch.device(device)
    before = peak_memory(where)
    patch = Patch(name, task, width, device)
    patch.window(mask)
    window = peak_memory(where) - before
    optimiser = torch.optim.AdamW(patch.network.parameters(), amsgrad=True)
    for _ in range(2):  # the first step has no moments yet
        patch.step(mask)
        optimiser.step()
    return Memory(peak_memory(where) - before, window)
