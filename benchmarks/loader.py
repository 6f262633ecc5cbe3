"""Samples a second from one process of the loader, against the training steps a second that use them up.

    python benchmarks/loader.py --out loader.json

Makes phantoms of 240x240x155 voxels, prepares them, and draws crops as training does, with the files in the system's
memory (warm) and not (cold), from uniform places and half of them around a label. Then one training step at the same
crop in the same run. Loader and step run one after the other, the loader in its one process and thread. Absolute
figures depend on the machine and on what else runs on it: what counts is the ratio, and, where others compute too, the
processor time of a sample: a step with several threads suffers from them far more than the loader. Linux only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import psutil
from compare import PRESENT, measure
from page_cache import drop

from models.task import Task
from training import atomic
from training.cases import PreparedDataset
from training.experiments.machine import git_state, machine
from training.experiments.tables import markdown
from training.loader import Loader, Subjects
from training.phantom import make_subject, write_subject
from training.prepare import prepare_dataset

GOAL = 5.0
"""Times faster than the steps that one process shall be."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--shape", type=int, nargs=3, default=[240, 240, 155], help="voxels of a phantom, of 1 mm")
    parser.add_argument("--crop", type=int, default=80)
    parser.add_argument("--epochs", type=int, default=6, help="passes over the subjects that are timed")
    parser.add_argument("--present", nargs="+", type=int, choices=list(PRESENT), default=[4, 2], help="modalities")
    parser.add_argument("--backbone", default="rfnet")
    parser.add_argument("--steps", type=int, default=4, help="training steps; the first is not counted")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("loader.json"))
    arguments = parser.parse_args()

    rows: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="passion-loader-") as folder:
        data = prepared(Path(folder), arguments.subjects, tuple(arguments.shape), arguments.crop)
        for number in arguments.present:
            step = _step(arguments, PRESENT[number])
            for foreground in (0.0, 0.5):
                for cold in (False, True):
                    drawn = _draw(data, PRESENT[number], arguments.crop, foreground, cold, arguments.epochs)
                    ratio = drawn["samples_per_s"] * step["best_warm_s"]
                    rows.append({"modalities": number, "loader": drawn, "step": step, "ratio": ratio})
                    print(f"{number} modalities, foreground {foreground}, {_state(drawn)}: {ratio:.0f}x", flush=True)
    print("\n" + table(rows))
    least = min(row["ratio"] for row in rows)
    print(f"least: {least:.1f} times the step rate; goal: {GOAL:.0f}")
    record = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python benchmarks/loader.py", *sys.argv[1:]]),
        "machine": machine(),
        "code": git_state(),
        "least_ratio": least,
        "goal": GOAL,
        "rows": rows,
    }
    atomic.write_text(arguments.out, json.dumps(record, indent=1) + "\n")


def table(rows: list[dict]) -> str:
    """Markdown: a row per number of modalities, share of crops around a label, and state of the files."""
    header = ["modalities", "`foreground`", "files", "loader, samples/s", "processor, ms a sample"]
    header += ["read, MB a sample", "steps/s", "times faster"]
    lines = []
    for row in rows:
        drawn, rate = row["loader"], row["loader"]["samples_per_s"]
        what = [str(row["modalities"]), f"{drawn['foreground']:g}", _state(drawn)]
        cost = [f"{rate:.1f}", f"{drawn['cpu_ms_per_sample']:.1f}", f"{drawn['read_mb_per_sample']:.1f}"]
        lines.append([*what, *cost, f"{1 / row['step']['best_warm_s']:.2f}", f"**{row['ratio']:.0f}**"])
    return markdown(header, lines, left=3)


def _state(drawn: dict) -> str:
    return "cold" if drawn["cold"] else "warm"


def prepared(folder: Path, subjects: int, shape: tuple[int, ...], crop: int) -> PreparedDataset:
    """Phantoms of `shape` voxels, prepared in `folder`/prepared for crops of `crop` voxels along each axis."""
    for index in range(1, subjects + 1):
        write_subject(folder / "phantoms", make_subject(7, index, shape=(shape[0], shape[1], shape[2])))
    task = Task.model_validate(Task.load("glioma").model_dump() | {"patch_size": [crop] * 3})
    report = prepare_dataset(folder / "phantoms", folder / "prepared", task)
    assert not report.broken, report.broken
    return PreparedDataset.open(folder / "prepared")


def _draw(
    data: PreparedDataset, present: list[str], crop: int, foreground: float, cold: bool, epochs: int
) -> dict[str, object]:
    """Whole epochs, one more to begin with; cold: every file is dropped before each, else all are read before."""
    cases = [data.case(case_id) for case_id in data.ids]
    subjects = Subjects(cases, [data.task.mask(present)] * len(cases), data.task, seed=1, foreground=foreground)
    files = sorted(data.root.glob("*/*.npy"))
    seconds, cpu, read, size = 0.0, 0.0, 0, 0
    with Loader(subjects, batch_size=1, workers=1) as loader:
        for epoch in range(epochs + 1):
            for file in files:
                if cold:
                    drop(file)
                elif epoch == 0:
                    file.read_bytes()
            before = _used()
            begun = time.perf_counter()
            for batch in loader.epoch(epoch):
                size = sum(batch.masks[0]) * batch.x[0, 0].nbytes + batch.labels.nbytes
            if epoch:  # the first starts the process
                seconds += time.perf_counter() - begun
                after = _used()
                cpu += after[0] - before[0]
                read += after[1] - before[1]
    samples = epochs * len(cases)
    return {
        "present": present,
        "crop": [crop] * 3,
        "foreground": foreground,
        "cold": cold,
        "workers": 1,
        "samples": samples,
        "samples_per_s": samples / seconds,
        "cpu_ms_per_sample": 1000 * cpu / samples,
        "read_mb_per_sample": read / samples / 1e6,
        "crop_mb": size / 1e6,
        "case_mb": sum(f.stat().st_size for f in files) / len(cases) / 1e6,
    }


def _used() -> tuple[float, int]:
    """Processor seconds, and bytes from the disk, of the loader's process."""
    children = psutil.Process().children()
    times = [child.cpu_times() for child in children]
    return sum(t.user + t.system for t in times), sum(child.io_counters().read_bytes for child in children)


def _step(arguments: argparse.Namespace, present: list[str]) -> dict:
    command = ["training_step.py", "--backbone", arguments.backbone, "--crop", str(arguments.crop)]
    return measure([*command, "--steps", str(arguments.steps), "--device", arguments.device, "--present", *present])


if __name__ == "__main__":
    main()
