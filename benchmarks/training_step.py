"""Time and peak memory of one training step (forward, backward, optimiser) on random data.

    python benchmarks/training_step.py --backbone unet --crop 80 --present flair t1 t2

Absolute figures depend on the machine and on what else runs on it; compare only within one machine and hour.
"""

from __future__ import annotations

import argparse
import json
import platform
import time

import torch

from models.backbones import BACKBONES
from models.task import Task
from training.device import choose_device, device_name
from training.footprint import Patch, peak_memory
from training.methods import METHODS, build_method
from training.passion.objective import terms

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=list(BACKBONES), default="rfnet")
    parser.add_argument("--method", choices=list(METHODS), default="passion")
    parser.add_argument("--task", default="glioma", help="a shipped task or a YAML file")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--crop", type=int, nargs="+", help="one side, or three; default: the task's patch size")
    parser.add_argument("--present", nargs="+", help="modalities; default: all of the task")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()

    task = Task.load(arguments.task)
    if arguments.crop:
        sides = arguments.crop if len(arguments.crop) == 3 else arguments.crop * 3
        task = Task.model_validate(task.model_dump() | {"patch_size": sides})
    present = arguments.present or list(task.names)
    mask = task.mask(present)
    device = choose_device(arguments.device)
    torch.manual_seed(0)
    patch = Patch(arguments.backbone, task, arguments.width, str(device))
    method = build_method(arguments.method, task.names, patch.classes)
    optimiser = torch.optim.AdamW(patch.network.parameters(), lr=2e-4, weight_decay=1e-4, amsgrad=True)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def step() -> tuple[float, float]:
        begun = now()
        losses = terms(patch.network, patch.x, patch.labels, [mask], patch.classes, distil=method.distils)
        total = method.total(losses, patch.ones)
        forward = now()
        optimiser.zero_grad()
        total.backward()
        method.after_backward(patch.network)
        optimiser.step()
        return forward - begun, now() - forward

    figures = []
    for number in range(arguments.steps):
        forward, backward = step()
        peak = peak_memory(device) / GIB
        figures.append({"forward_s": forward, "backward_s": backward, "peak_gib": peak})
        print(f"step {number}: forward {forward:.2f} s, backward {backward:.2f} s, peak {peak:.2f} GiB", flush=True)
    summary = {
        "backbone": arguments.backbone,
        "method": arguments.method,
        "task": task.name,
        "width": arguments.width,
        "crop": task.patch_size,
        "present": present,
        "torch": torch.__version__,
        "device": device_name(device),
        "machine": platform.machine(),
        "first_s": figures[0]["forward_s"] + figures[0]["backward_s"],
        "best_warm_s": min(f["forward_s"] + f["backward_s"] for f in figures[1:] or figures),
        "peak_gib_after_one": figures[0]["peak_gib"],
        "peak_gib": figures[-1]["peak_gib"],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
