"""Time and peak memory of one training step (forward, backward, optimiser) on random data.

    python benchmarks/training_step.py --backbone unet --crop 80 --present flair t1 t2

`--implementation straightforward` measures the frozen baseline beside this file. Absolute figures depend on the machine
and on what else runs on it; compare only within one machine and hour, as `make bench` does.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import straightforward
import torch
from floors import Traffic
from torch import Tensor

from models.backbones import BACKBONES
from models.heap import kept_heap
from models.precision import PRECISIONS, check_precision
from models.task import Task
from training.compiled import compile_shared
from training.device import choose_device, device_name
from training.footprint import Patch, peak_memory
from training.loader import Batch
from training.loss import Loss
from training.methods import METHODS, build_method
from training.ranks import ALONE

GIB = 2**30
WARM = 2
"""Steps that do not count: the first of all, and the one that is recorded."""


def main() -> None:
    print(json.dumps(run(parser().parse_args())))


def parser() -> argparse.ArgumentParser:
    """What can be said on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementation", choices=["ours", "straightforward"], default="ours")
    parser.add_argument("--backbone", choices=list(BACKBONES), default="rfnet")
    parser.add_argument("--method", choices=list(METHODS), default="passion")
    parser.add_argument("--task", default="glioma", help="a shipped task or a YAML file")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--crop", type=int, nargs="+", help="one side, or three; default: the task's patch size")
    parser.add_argument("--present", nargs="+", help="modalities; default: all of the task")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=1, help="samples of a step, all with the same modalities")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--compile", action="store_true", help="compile the encoders and the separate decoder")
    parser.add_argument("--graphs", action="store_true", help="record the step as CUDA graphs, as the trainer does")
    parser.add_argument("--count", action="store_true", help="count a step's operations and the bytes they move, too")
    return parser


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of figures; says every step's as it goes."""
    task = Task.load(arguments.task)
    if arguments.crop:
        sides = arguments.crop if len(arguments.crop) == 3 else arguments.crop * 3
        task = Task.model_validate(task.model_dump() | {"patch_size": sides})
    present = arguments.present or list(task.names)
    mask = task.mask(present)
    device = choose_device(arguments.device)
    is_ours, on_gpu = arguments.implementation == "ours", device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    figures = []
    with ground(device, is_ours):
        network, total, after_backward = _work(arguments, task, mask, device)
        optimiser = torch.optim.AdamW(network.parameters(), lr=2e-4, weight_decay=1e-4, amsgrad=True, fused=is_ours)
        step = _step(total, after_backward, optimiser, device)
        for number in range(arguments.steps):
            forward, backward = step()
            peak = peak_memory(device) / GIB
            figures.append({"forward_s": forward, "backward_s": backward, "peak_gib": peak})
            print(f"step {number}: {forward + backward:.3f} s, peak {peak:.2f} GiB", flush=True)
    warm = min(figures[WARM:] or figures, key=lambda f: f["forward_s"] + f["backward_s"])
    summary = {
        "implementation": arguments.implementation,
        "backbone": arguments.backbone,
        "method": arguments.method,
        "task": task.name,
        "width": arguments.width,
        "crop": task.patch_size,
        "present": present,
        "torch": torch.__version__,
        "device": device_name(device),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "first_s": figures[0]["forward_s"] + figures[0]["backward_s"],
        "forward_s": warm["forward_s"],
        "backward_s": warm["backward_s"],
        "best_warm_s": warm["forward_s"] + warm["backward_s"],
        "peak_gib_after_one": figures[0]["peak_gib"],
        "peak_gib": figures[-1]["peak_gib"],
        "batch": arguments.batch,
        "precision": arguments.precision,
        "compile": arguments.compile,
        "graphs": arguments.graphs,
    }
    if arguments.count:
        del network, total, after_backward, optimiser, step
        arguments.graphs = False  # what a graph does cannot be watched
        network, total, after_backward = _work(arguments, task, mask, device)
        with Traffic() as traffic:
            total().backward()
            after_backward()
        summary |= {"flops": traffic.flops, "bytes": traffic.bytes}
    return summary


@contextmanager
def ground(device: torch.device, is_ours: bool) -> Iterator[None]:
    """What steps run on: as the trainer's do; the straightforward ones run as torch does by default."""
    if device.type == "cpu":
        with kept_heap() if is_ours else nullcontext():
            yield
        return
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = is_ours
    try:
        with torch.cuda.stream(torch.cuda.Stream(device)):
            yield
    finally:
        torch.backends.cudnn.benchmark = before


def _work(arguments: argparse.Namespace, task: Task, mask: tuple[bool, ...], device: torch.device) -> Work:
    torch.manual_seed(0)
    return IMPLEMENTATIONS[arguments.implementation](arguments, task, mask, device)


def _step(
    total: Callable[[], Tensor],
    after_backward: Callable[[], None],
    optimiser: torch.optim.Optimizer,
    device: torch.device,
) -> Callable[[], tuple[float, float]]:
    """A training step, which gives the seconds up to the loss and after it; of a GPU's, which nothing waits for
    between them, those that its start took are the first."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def step() -> tuple[float, float]:
        begun = now()
        loss = total()
        forward = time.perf_counter()
        optimiser.zero_grad()
        loss.backward()
        after_backward()
        optimiser.step()
        return forward - begun, now() - forward

    return step


Work = tuple[torch.nn.Module, Callable[[], Tensor], Callable[[], None]]
"""The network, the forward pass to a loss, and what the method does with the gradients."""


def ours(arguments: argparse.Namespace, task: Task, mask: tuple[bool, ...], device: torch.device) -> Work:
    check_precision(arguments.precision, device)
    patch = Patch(arguments.backbone, task, arguments.width, str(device))
    method = build_method(arguments.method, task.names, patch.classes)
    if arguments.compile:
        compile_shared(patch.network)
    loss = Loss(patch.network, method, patch.ones, patch.classes, ALONE, arguments.precision, arguments.graphs)
    x = patch.x.repeat(arguments.batch, 1, 1, 1, 1)
    batch = Batch(x, patch.labels.repeat(arguments.batch, 1, 1, 1), [mask] * arguments.batch, [mask] * arguments.batch)
    return patch.network, lambda: loss(batch).total, lambda: method.after_backward(patch.network)


def plain(arguments: argparse.Namespace, task: Task, mask: tuple[bool, ...], device: torch.device) -> Work:
    if arguments.backbone not in straightforward.NETWORKS or arguments.method != "passion":
        raise SystemExit(f"straightforward is {', '.join(straightforward.NETWORKS)} with method passion, and no other")
    patch = Patch(arguments.backbone, task, arguments.width, str(device))
    x, labels, ones = patch.x.contiguous(), patch.labels, patch.ones
    network = straightforward.NETWORKS[arguments.backbone](task.names, patch.classes, task.patch_size, arguments.width)
    network.to(device)
    del patch
    masks = torch.tensor([mask], device=device)
    return network, lambda: straightforward.total_loss(network, x, labels, masks, ones, ones)[0], lambda: None


IMPLEMENTATIONS = {"ours": ours, "straightforward": plain}

if __name__ == "__main__":
    main()
