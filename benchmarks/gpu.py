"""A GPU's figures: training steps beside what the card can do at best, windows, masks in bfloat16, a whole epoch.

    bash benchmarks/gpu.sh --out gpu-bench.json
    python benchmarks/gpu.py --device cpu --crop 32 --backbone unet    # whether it works

The floor of a step is the larger of two times: the bytes that its operations read and write, over the bandwidth of a
copy, and its floating-point operations, over the rate of a product of matrices in the same precision; both measured in
the same run. Share of floor: floor / step time; 100 % is a card that does nothing but what the operations ask.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import floors
import numpy as np
import torch
from compare import PRESENT, measure
from loader import prepared

from models.backbones import BACKBONES
from models.checkpoint import Checkpoint
from models.precision import PRECISIONS, PrecisionError, check_precision
from models.predictor import Predictor
from training import atomic
from training.config import TrainConfig
from training.device import choose_device, device_name
from training.experiments.machine import git_state, machine
from training.experiments.tables import markdown
from training.phantom import make_subject, write_subject
from training.trainer import Trainer

HERE = Path(__file__).parent
DEMO = HERE.parent / "models" / "checkpoints" / "glioma-phantom-rfnet"
BATCH = 8
"""Of the row that shows whether the paper's card, of 24 GB, would do."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", choices=list(BACKBONES), default=["rfnet", "mmformer", "m2ftrans"])
    parser.add_argument("--present", type=int, choices=list(PRESENT), default=3, help="modalities of a step")
    parser.add_argument("--crop", type=int, default=80)
    parser.add_argument("--box", type=int, default=120, help="voxels along each axis of the box that is segmented")
    parser.add_argument("--steps", type=int, default=10, help="training steps; the first is not counted")
    parser.add_argument("--subjects", type=int, default=16, help="phantoms of the epoch")
    parser.add_argument("--epochs", type=int, default=4, help="the first is not counted")
    parser.add_argument("--masks", type=int, default=10, help="phantoms that are segmented in both precisions")
    parser.add_argument("--shape", type=int, nargs=3, default=[240, 240, 155], help="voxels of a phantom, of 1 mm")
    parser.add_argument("--workers", type=int, default=4, help="loader processes of the epoch")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu-bench.json"))
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    record: dict = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]),
        "device": device_name(device),
        "machine": machine(),
        "code": git_state(),
        "bandwidth": floors.bandwidth(device),
        "rates": {precision: floors.rate(device, precision) for precision in _precisions(device)},
    }
    rates = ", ".join(f"{rate / 1e12:.1f} TFLOP/s in {name}" for name, rate in record["rates"].items())
    print(f"{record['device']}: {record['bandwidth'] / 1e9:.0f} GB/s, {rates}\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="passion-gpu-") as folder:
        for name in arguments.parts:
            rows = PARTS[name](arguments, device, Path(folder), record)
            record[name] = rows
            print(_table(rows) + "\n", flush=True)
            atomic.write_text(arguments.out, json.dumps(record, indent=1) + "\n")


def steps(arguments: argparse.Namespace, device: torch.device, _folder: Path, record: dict) -> list[dict]:
    """A row per backbone and way to run it, each in a process of its own."""
    rows = []
    for backbone in arguments.backbone:
        for precision in record["rates"]:
            ways: list[list[str]] = [[], ["--compile"]]
            if device.type == "cuda":
                ways[1:1] = [["--channels-last"]]
            if backbone == arguments.backbone[0]:
                ways.append(["--batch", str(BATCH)])
            for way in ways:
                command = ["--backbone", backbone, "--present", *PRESENT[arguments.present], "--precision", precision]
                command += ["--crop", str(arguments.crop), "--steps", str(arguments.steps), *way]
                # What is compiled moves fewer bytes, but not before a counter's eyes.
                count = [] if "--compile" in way else ["--count"]
                found = measure(["training_step.py", *command, *count, "--device", arguments.device])
                rows.append(_step_row(found, record))
    return rows


def _step_row(found: dict, record: dict) -> dict:
    seconds = found["best_warm_s"]
    row = {
        "training step": found["backbone"],
        "precision": found["precision"],
        "batch": found["batch"],
        "channels last": "yes" if found["channels_last"] else "no",
        "compiled": "yes" if found["compile"] else "no",
        "ms": 1000 * seconds,
        "samples/s": found["batch"] / seconds,
        "peak GiB": found["peak_gib"],
        "first step, s": found["first_s"],
    }
    if "bytes" in found:
        moving, computing = found["bytes"] / record["bandwidth"], found["flops"] / record["rates"][found["precision"]]
        row |= {"floor of bytes, ms": 1000 * moving, "floor of flops, ms": 1000 * computing}
        row["share of floor, %"] = 100 * max(moving, computing) / seconds
    return row


def windows(arguments: argparse.Namespace, _device: torch.device, _folder: Path, record: dict) -> list[dict]:
    """A box of windows, from normalised scans to probabilities."""
    rows = []
    for backbone in arguments.backbone:
        for precision in record["rates"]:
            for number in (4, 1):
                command = ["--backbone", backbone, "--present", *PRESENT[number], "--box", str(arguments.box)]
                found = measure(["inference.py", *command, "--precision", precision, "--device", arguments.device])
                rows.append(
                    {
                        "segmented box": backbone,
                        "precision": precision,
                        "modalities": number,
                        "s": found["best_warm_s"],
                        "windows/s": found["windows"] / found["best_warm_s"],
                        "peak GiB": found["peak_gib"],
                    }
                )
    return rows


def masks(arguments: argparse.Namespace, device: torch.device, folder: Path, record: dict) -> list[dict]:
    """The demo model's masks of phantoms, all modalities, in bfloat16 against those in float32; the last row is all."""
    if "bfloat16" not in record["rates"]:
        return []
    checkpoint = Checkpoint.load(DEMO, device)
    shape = (arguments.shape[0], arguments.shape[1], arguments.shape[2])
    rows = []
    for index in range(1, arguments.masks + 1):
        case = write_subject(folder / "unseen", make_subject(4052, index, shape=shape))
        scans = {m: case / f"{case.name}_{m}.nii.gz" for m in PRESENT[4]}
        exact, reduced = (Predictor(checkpoint, device, precision=p).segment(scans).classes for p in PRECISIONS)
        tumour = int(np.count_nonzero(exact))
        differ = int(np.count_nonzero(exact != reduced))
        share = 100 * differ / max(tumour, 1)
        rows.append({"mask of phantom": index, "tumour voxels": tumour, "differ": differ, "differ, %": share})
    tumour, differ = (sum(row[key] for row in rows) for key in ("tumour voxels", "differ"))
    whole = {
        "mask of phantom": "all",
        "tumour voxels": tumour,
        "differ": differ,
        "differ, %": 100 * differ / max(tumour, 1),
    }
    return [*rows, whole]


def epoch(arguments: argparse.Namespace, device: torch.device, folder: Path, record: dict) -> list[dict]:
    """An epoch from prepared cases on disk: how much of it the steps take. The first epoch is not counted."""
    prepared(folder, arguments.subjects, tuple(arguments.shape), arguments.crop)
    split = [sys.executable, "-m", "training", "split", str(folder / "prepared"), "--out", str(folder / "split")]
    subprocess.run([*split, "--preset", "mr2468", "--val", "0", "--test", "0"], check=True, capture_output=True)
    rows = []
    for precision in record["rates"]:
        config = TrainConfig(
            data=folder / "prepared", split=folder / "split", out=folder / precision, epochs=arguments.epochs,
            backbone=arguments.backbone[0], precision=precision, workers=arguments.workers, device=arguments.device,
        )  # fmt: skip
        ends, inside = [], []

        def note(entry: dict, ends: list[float] = ends, inside: list[float] = inside) -> None:
            ends.append(time.perf_counter())
            inside.append(entry["seconds"])

        Trainer(config).run(on_epoch=note)
        wall, steps_s = ends[-1] - ends[0], inside[-1] - inside[0]
        counted = arguments.subjects * (len(ends) - 1)
        rows.append(
            {
                "epoch": arguments.backbone[0],
                "precision": precision,
                "samples/s": counted / wall,
                "in steps, %": 100 * steps_s / wall,
            }
        )
    return rows


PARTS = {"steps": steps, "windows": windows, "masks": masks, "epoch": epoch}


def _precisions(device: torch.device) -> list[str]:
    """Those that the device has."""
    found = []
    for precision in PRECISIONS:
        try:
            check_precision(precision, device)
        except PrecisionError as error:
            print(f"left out: {error}")
        else:
            found.append(precision)
    return found


def _table(rows: list[dict]) -> str:
    header = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[_said(row.get(key, "")) for key in header] for row in rows]
    return markdown(header, lines, left=2)


def _said(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
