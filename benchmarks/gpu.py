"""A GPU's figures: whether it computes what a CPU does; training steps beside what the card can do at best, windows,
masks in bfloat16, a whole epoch.

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
import inference
import numpy as np
import straightforward
import torch
import training_step
from compare import PRESENT
from loader import prepared
from torch import Tensor

from models.backbones import BACKBONES
from models.checkpoint import Checkpoint
from models.precision import PRECISIONS, PrecisionError, check_precision
from models.predictor import Predictor
from models.task import Task
from training import atomic
from training.config import TrainConfig
from training.device import choose_device, device_name
from training.experiments.machine import git_state, machine
from training.experiments.tables import markdown
from training.footprint import Patch
from training.loader import Batch
from training.loss import Loss
from training.methods import build_method
from training.phantom import make_subject, write_subject
from training.ranks import ALONE
from training.trainer import Trainer

HERE = Path(__file__).parent
DEMO = HERE.parent / "models" / "checkpoints" / "glioma-phantom-rfnet"
SMALL = 32
"""The side of the crop that a CPU computes, too."""
BATCH = 8
"""Of the row that shows whether the paper's card, of 24 GB, would do."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", choices=list(BACKBONES), default=["rfnet", "mmformer", "m2ftrans"])
    parser.add_argument("--present", type=int, choices=list(PRESENT), default=3, help="modalities of a step")
    parser.add_argument("--crop", type=int, default=80)
    parser.add_argument("--box", type=int, default=120, help="voxels along each axis of the box that is segmented")
    parser.add_argument("--steps", type=int, default=8, help="training steps; the first two are not counted")
    parser.add_argument("--subjects", type=int, default=16, help="phantoms of the epoch")
    parser.add_argument("--epochs", type=int, default=4, help="the first is not counted")
    parser.add_argument("--masks", type=int, default=10, help="phantoms that are segmented in both precisions")
    parser.add_argument("--checkpoint", nargs="+", type=Path, default=[DEMO], help="models that segment them")
    parser.add_argument("--shape", type=int, nargs=3, default=[240, 240, 155], help="voxels of a phantom, of 1 mm")
    parser.add_argument("--workers", type=int, default=4, help="loader processes of the epoch")
    parser.add_argument("--compile", action="store_true", help="compiled steps, too, which take minutes to begin")
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


def equal(arguments: argparse.Namespace, device: torch.device, _folder: Path, _record: dict) -> list[dict]:
    """A step's losses and gradients in float32: the device's against a CPU's, a recorded step's against one's that is
    not. The Euclidean norm of what they differ by, as a share of the norm of the second."""
    rows = []
    for backbone in arguments.backbone:
        here, on_cpu = (_two_steps(arguments, backbone, where) for where in (device, torch.device("cpu")))
        pairs = {"this device, CPU": (here[0], on_cpu[0])}
        if device.type == "cuda":
            pairs["recorded, not"] = (here[1], here[0])
        for name, (own, other) in pairs.items():
            losses, gradients = (float((a - b).norm() / b.norm()) for a, b in zip(own, other, strict=True))
            rows.append({"equality": backbone, "": name, "losses": losses, "gradients": gradients})
    return rows


def _two_steps(arguments: argparse.Namespace, backbone: str, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The losses and the gradients, each in a row, of two steps from the same weights; on a GPU the second is recorded.
    Without dropout, whose numbers are a device's own."""
    task = Task.load("glioma")
    task = Task.model_validate(task.model_dump() | {"patch_size": [min(arguments.crop, SMALL)] * 3})
    torch.manual_seed(0)
    patch = Patch(backbone, task, 8, "cpu")
    network, mask = patch.network.eval().to(device), task.mask(PRESENT[arguments.present])
    method, ones = build_method("passion", task.names, patch.classes), patch.ones.to(device)
    loss = Loss(network, method, ones, patch.classes, ALONE, graphs=device.type == "cuda")
    batch = Batch(patch.x.contiguous().to(device), patch.labels.to(device), [mask], [mask])
    found = []
    with training_step.ground(device, True):
        for _ in range(2):
            network.zero_grad()
            outcome = loss(batch)
            outcome.total.backward()
            terms = outcome.losses
            losses = [t.flatten() for t in (terms.fuse, terms.prm, terms.sep, terms.kl, terms.proto)]
            gradients = [(p.new_zeros(p.shape) if p.grad is None else p.grad).flatten() for p in network.parameters()]
            found.append((torch.cat(losses).detach().cpu(), torch.cat(gradients).cpu()))
    return found


def steps(arguments: argparse.Namespace, device: torch.device, _folder: Path, record: dict) -> list[dict]:
    """A row per backbone and way to run it."""
    rows = []
    for backbone in arguments.backbone:
        common = ["--backbone", backbone, "--present", *PRESENT[arguments.present], "--crop", str(arguments.crop)]
        common += ["--steps", str(arguments.steps), "--device", arguments.device]
        if backbone in straightforward.NETWORKS:
            rows.append(_step([*common, "--implementation", "straightforward"], record))
            _say(rows)
        for precision in record["rates"]:
            ways = [["--graphs", "--count"] if device.type == "cuda" else ["--count"]]
            if precision == PRECISIONS[0]:
                ways += [[]] if device.type == "cuda" else []
                ways += [["--batch", str(BATCH)]] if backbone == arguments.backbone[0] else []
            if arguments.compile and backbone == arguments.backbone[0]:
                ways.append(["--compile"])
            for way in ways:
                rows.append(_step([*common, "--precision", precision, *way], record))
                _say(rows)
    return rows


def _say(rows: list[dict]) -> None:
    print(f"{rows[-1]}", flush=True)


def _step(command: list[str], record: dict) -> dict:
    found = training_step.run(training_step.parser().parse_args(command))
    seconds = found["best_warm_s"]
    row = {
        "training step": found["backbone"],
        "": found["implementation"],
        "precision": found["precision"],
        "batch": found["batch"],
        "graphs": "yes" if "--graphs" in command else "no",
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
                command += ["--precision", precision, "--device", arguments.device]
                found = inference.run(inference.parser().parse_args(command))
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
    """Masks of phantoms, all modalities, in bfloat16 against those in float32; the last row of a model is all."""
    if "bfloat16" not in record["rates"]:
        return []
    shape = (arguments.shape[0], arguments.shape[1], arguments.shape[2])
    subjects = (make_subject(4052, index, shape=shape) for index in range(1, arguments.masks + 1))
    cases = [write_subject(folder / "unseen", subject) for subject in subjects]
    rows = []
    for path in arguments.checkpoint:
        checkpoint = Checkpoint.load(path, device)
        exact, reduced = (Predictor(checkpoint, device, precision=p) for p in PRECISIONS)
        counts = []
        for case in cases:
            scans = {m: case / f"{case.name}_{m}.nii.gz" for m in PRESENT[4]}
            one, other = (p.segment(scans).classes for p in (exact, reduced))
            counts.append((int(np.count_nonzero(one)), int(np.count_nonzero(one != other))))
        counts.append((sum(tumour for tumour, _ in counts), sum(differ for _, differ in counts)))
        phantoms = [*map(str, range(1, len(cases) + 1)), "all"]
        rows += [
            {
                "masks of": checkpoint.card.name,
                "phantom": phantom,
                "tumour voxels": tumour,
                "differ": differ,
                "differ, %": 100 * differ / max(tumour, 1),
            }
            for phantom, (tumour, differ) in zip(phantoms, counts, strict=True)
        ]
    return rows


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


PARTS = {"equal": equal, "steps": steps, "windows": windows, "masks": masks, "epoch": epoch}


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
