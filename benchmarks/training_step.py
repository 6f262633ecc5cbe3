"""Time and peak memory of one training step (forward, backward, optimiser) on random data.

    python benchmarks/training_step.py --crop 80 --present flair t1 t2

Absolute figures depend on the machine and on what else runs on it; compare only within one machine and hour.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time

import torch

from models.backbones import BACKBONES, build
from models.task import Task
from training.passion.objective import terms


def main() -> None:
    task = Task.load("glioma")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=list(BACKBONES), default="rfnet")
    parser.add_argument("--crop", type=int, default=80)
    parser.add_argument("--present", nargs="+", choices=task.names, default=["flair", "t1", "t2"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--no-passion", action="store_true", help="the backbone's own loss, without students")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    network = build(arguments.backbone, task, 8)
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-4, weight_decay=1e-4, amsgrad=True)
    size, classes = arguments.crop, len(task.labels)
    x = torch.randn(1, len(task.names), size, size, size)
    labels = torch.zeros(1, size, size, size, dtype=torch.long)
    for label, part in ((2, 2), (3, 3), (1, 5)):  # three nested boxes
        labels[:, size // 4 : size // 4 + size // part, size // 4 : size // 2, size // 4 : size // 2] = label
    mask = task.mask(arguments.present)
    ones = torch.ones(len(task.names))

    def step() -> tuple[float, float]:
        begun = time.perf_counter()
        losses = terms(network, x, labels, [mask], classes, distil=not arguments.no_passion)
        total = losses.baseline() if arguments.no_passion else losses.passion(ones, ones)
        forward = time.perf_counter()
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        return forward - begun, time.perf_counter() - forward

    figures = []
    for number in range(arguments.steps):
        forward, backward = step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        figures.append({"forward_s": forward, "backward_s": backward, "peak_gb": peak})
        print(f"step {number}: forward {forward:.2f} s, backward {backward:.2f} s, peak {peak:.2f} GB", flush=True)
    best = min(f["forward_s"] + f["backward_s"] for f in figures[1:] or figures)
    summary = {
        "backbone": arguments.backbone,
        "crop": size,
        "present": arguments.present,
        "passion": not arguments.no_passion,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "first_s": figures[0]["forward_s"] + figures[0]["backward_s"],
        "best_warm_s": best,
        "peak_gb_after_one": figures[0]["peak_gb"],
        "peak_gb": figures[-1]["peak_gb"],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
