"""The cost of a sample as subjects grow: whole training runs on small phantoms, loader included.

    OMP_NUM_THREADS=1 python benchmarks/subjects.py --out subjects.json
    torchrun --standalone --nproc-per-node 2 benchmarks/subjects.py --out subjects-2.json

Every number of subjects trains on as many samples, several times in turn, so that a machine that slows down meanwhile
slows all down. All subjects have all modalities: samples cost the same. Prints a table, and writes all figures as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from models.task import Task
from training import atomic
from training.config import TrainConfig
from training.experiments.machine import git_state, machine
from training.experiments.tables import markdown
from training.missingness import MissingnessTable
from training.parallel import cores
from training.phantom import make_subject, write_subject
from training.prepare import prepare_dataset
from training.ranks import Ranks, join
from training.trainer import StepReport, Trainer

SHAPE, SPACING = (60, 60, 39), 4.0
"""Of a phantom: voxels, mm."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--samples", type=int, help="of each run; default: the largest number of subjects")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backbone", default="rfnet")
    parser.add_argument("--crop", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("subjects.json"))
    arguments = parser.parse_args()
    with join() as ranks:
        _measure_all(arguments, ranks)


def _measure_all(arguments: argparse.Namespace, ranks: Ranks) -> None:
    with _shared_folder(ranks) as root:
        if ranks.main:
            _make_data(root, max(arguments.subjects))
        ranks.wait()
        rows: list[dict] = [{"subjects": n, "seconds_a_sample": []} for n in arguments.subjects]
        for number, row in itertools.product(range(arguments.rounds), rows):
            row["seconds_a_sample"].append(_measure(root, row["subjects"], number, arguments, ranks))
        ranks.wait()
    if not ranks.main:
        return
    print(table(rows))
    record = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["benchmarks/subjects.py", *sys.argv[1:]]),
        "processes": ranks.world,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "code": git_state(),
        "rows": rows,
    }
    atomic.write_text(arguments.out, json.dumps(record, indent=1) + "\n")


@contextlib.contextmanager
def _shared_folder(ranks: Ranks):
    """The main rank's, of which the others are told."""
    with tempfile.TemporaryDirectory() as own:
        yield Path(bytes(ranks.gather(torch.tensor(list(own.encode())))[0].tolist()).decode())


def _make_data(root: Path, subjects: int) -> None:
    task = Task.load("glioma-4mm")
    for index in range(1, subjects + 1):
        write_subject(root / "phantoms", make_subject(5, index, shape=SHAPE, spacing=SPACING))
    report = prepare_dataset(root / "phantoms", root / "prepared", task, workers=cores())
    if report.broken:
        raise SystemExit("the phantoms could not be prepared")
    ids = sorted(p.name for p in (root / "phantoms").iterdir())
    split = root / "split"
    split.mkdir()
    (split / "train.txt").write_text("".join(f"{i}\n" for i in ids))
    MissingnessTable(task.names, dict.fromkeys(ids, (True,) * len(task.names))).write(split / "missingness.csv")


def _measure(root: Path, subjects: int, number: int, arguments: argparse.Namespace, ranks: Ranks) -> float:
    """Seconds of wall time a sample, of all ranks together: loading, training and all but the checkpoints."""
    split = root / f"split-{subjects}"
    if ranks.main:
        split.mkdir(exist_ok=True)
        ids = (root / "split" / "train.txt").read_text().splitlines(keepends=True)
        (split / "train.txt").write_text("".join(ids[:subjects]))
        (split / "missingness.csv").write_bytes((root / "split" / "missingness.csv").read_bytes())
    ranks.wait()
    epochs = -(-(arguments.samples or max(arguments.subjects)) // subjects) + 1  # the first is not counted
    config = TrainConfig(
        data=root / "prepared",
        split=split,
        out=root / f"run-{subjects}-{number}",
        backbone=arguments.backbone,
        crop=(arguments.crop,) * 3,
        epochs=epochs,
        workers=arguments.workers,
        device=arguments.device,
    )
    trainer = Trainer(config, ranks=ranks)
    begun, spent = time.perf_counter(), 0.0

    def on_step(report: StepReport) -> None:
        nonlocal spent
        if report.step == report.steps and report.epoch:
            spent += time.perf_counter() - begun

    def on_epoch(_record: dict) -> None:
        nonlocal begun
        begun = time.perf_counter()

    trainer.run(on_step, on_epoch)
    return spent / (subjects * (epochs - 1))


def table(rows: list[dict]) -> str:
    """Markdown: the best round, which other work on the machine disturbed least, beside the first row's; the others."""
    header = ["subjects", "ms a sample, best", "median", "worst", "best, of the first row's"]
    first = min(rows[0]["seconds_a_sample"])
    lines = []
    for row in rows:
        found = row["seconds_a_sample"]
        times = [f"{1000 * f(found):.0f}" for f in (min, statistics.median, max)]
        lines.append([str(row["subjects"]), *times, f"{min(found) / first:.2f}"])
    return markdown(header, lines, left=1)


if __name__ == "__main__":
    main()
