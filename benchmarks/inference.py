"""Time and peak memory of segmenting a brain's box by sliding windows, on random data.

    python benchmarks/inference.py --backbone rfnet --present flair --box 120

From normalised scans to class probabilities; reading files, normalising and writing the mask are not in it.
`--implementation straightforward` measures the frozen baseline beside this file, on the same windows. Absolute figures
depend on the machine and on what else runs on it; compare only within one machine and hour, as `make bench` does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from math import ceil
from typing import Any

import nibabel as nib
import numpy as np
import straightforward
import torch
from untrained import untrained

from models.backbones import BACKBONES
from models.intake import Box, Intake, WorkingGrid
from models.precision import PRECISIONS
from models.predictor import OVERLAP, Predictor
from models.task import Task
from models.volume import Grid
from models.windows import Windows
from training.device import choose_device, device_name
from training.footprint import peak_memory

GIB = 2**30


def main() -> None:
    print(json.dumps(run(parser().parse_args())))


def parser() -> argparse.ArgumentParser:
    """What can be said on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementation", choices=["ours", "straightforward"], default="ours")
    parser.add_argument("--backbone", choices=list(BACKBONES), default="rfnet")
    parser.add_argument("--present", nargs="+", help="modalities; default: all of the task")
    parser.add_argument("--box", type=int, default=120, help="voxels along each axis")
    parser.add_argument("--runs", type=int, default=4, help="the first warms up; the best of the others counts")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of ours")
    parser.add_argument("--device", default="auto")
    return parser


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of figures."""
    task = Task.load("glioma")
    present = arguments.present or list(task.names)
    device = choose_device(arguments.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    shape = (arguments.box,) * 3
    rng = np.random.default_rng(0)
    arrays = {name: rng.uniform(1, 2, shape).astype(np.float32) for name in present}
    if arguments.implementation == "ours":
        segment = ours(arguments.backbone, task, arrays, device, arguments.precision)
    else:
        segment = plain(arguments.backbone, task, arrays, device)
    seconds = []
    for _ in range(arguments.runs):
        begun = time.perf_counter()
        segment()
        seconds.append(time.perf_counter() - begun)
    return {
        "implementation": arguments.implementation,
        "backbone": arguments.backbone,
        "present": present,
        "box": shape,
        "windows": len(Windows(shape, task.patch_size, OVERLAP)),
        "torch": torch.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "precision": arguments.precision,
        "first_s": seconds[0],
        "best_warm_s": min(seconds[1:] or seconds),
        "peak_gib": peak_memory(device) / GIB,
    }


def ours(
    backbone: str, task: Task, arrays: dict[str, np.ndarray], device: torch.device, precision: str
) -> Callable[[], object]:
    predictor = Predictor(untrained(backbone, task), device, precision=precision)
    shape = next(iter(arrays.values())).shape
    grid = Grid.of(nib.Nifti1Image(next(iter(arrays.values())), np.diag([-1.0, -1.0, 1.0, 1.0])))
    working = WorkingGrid.of(grid, task)
    intake = Intake(arrays, Box((0, 0, 0), shape), working)
    return lambda: predictor.probabilities(intake)


def plain(backbone: str, task: Task, arrays: dict[str, np.ndarray], device: torch.device) -> Callable[[], object]:
    network = straightforward.NETWORKS[backbone](task.names, len(task.labels), task.patch_size).to(device).eval()
    shape = next(iter(arrays.values())).shape
    x = torch.zeros(1, len(task.names), *shape)
    for k, name in enumerate(task.names):
        if name in arrays:
            x[0, k] = torch.from_numpy((arrays[name] - arrays[name].mean()) / arrays[name].std())
    mask = torch.tensor([[name in arrays for name in task.names]], device=device)

    def starts(size: int, window: int) -> list[int]:
        step = int(window * (1 - OVERLAP))
        return [min(i * step, size - window) for i in range(ceil((size - window) / step) + 1)]

    def segment() -> torch.Tensor:
        total, count = torch.zeros(1, len(task.labels), *shape), torch.zeros(1, 1, *shape)
        for corner in itertools.product(*map(starts, shape, task.patch_size)):
            place = (..., *(slice(a, a + w) for a, w in zip(corner, task.patch_size, strict=True)))
            total[place] += straightforward.segment_window(network, x[place].to(device), mask).cpu()
            count[place] += 1
        return total / count

    return segment


if __name__ == "__main__":
    main()
