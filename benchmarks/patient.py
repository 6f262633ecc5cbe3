"""A whole patient, cold: from the start of `passion predict` to the mask on disk, with the process's peak memory.

    python benchmarks/patient.py --backbone rfnet --present 4 1

A phantom of 240x240x155 voxels at 1 mm, untrained weights of the published size; each line is the best of `--runs`
processes. Prints what a cold start consists of, too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from untrained import untrained

from models.backbones import BACKBONES
from models.checkpoint import save_checkpoint
from models.task import Task
from training.experiments.tables import markdown

PASSION = Path(sys.executable).parent / "passion"
PRESENT = {4: ["flair", "t1ce", "t1", "t2"], 1: ["flair"]}
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--present", nargs="+", type=int, choices=list(PRESENT), default=list(PRESENT))
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _measured([str(PASSION), "phantom", str(folder / "phantoms"), "--subjects", "1", "--seed", "4052"])
        case = next(path for path in (folder / "phantoms").iterdir() if path.is_dir())
        checkpoints = {backbone: folder / backbone for backbone in arguments.backbone}
        for backbone, place in checkpoints.items():
            checkpoint = untrained(backbone, Task.load("glioma"))
            save_checkpoint(place, checkpoint.card, checkpoint.network)
        print(markdown(["cold start", "s"], list(_cold(checkpoints, arguments.runs)), left=1) + "\n")
        lines = []
        for backbone, place in checkpoints.items():
            for number in arguments.present:
                scans = [part for m in PRESENT[number] for part in (f"--{m}", str(case / f"{case.name}_{m}.nii.gz"))]
                command = [str(PASSION), "predict", str(place), *scans, "-o", str(folder / "mask.nii.gz")]
                command += ["--device", arguments.device]
                figures = []
                for option in ([], ["--fast"]):
                    runs = [_measured(command + option) for _ in range(arguments.runs)]
                    figures += [f"{min(s for s, _ in runs):.1f}", f"{max(peak for _, peak in runs) / GIB:.2f}"]
                lines.append([backbone, str(number), *figures])
        print(markdown(["backbone", "modalities", "s", "peak, GiB", "--fast, s", "--fast, GiB"], lines, left=2))


def _cold(checkpoints: dict[str, Path], runs: int) -> list[list[str]]:
    """What a first mask waits for, each in a process of its own."""
    timed = "import time; begun = time.perf_counter(); {}; print(time.perf_counter() - begun)"
    codes = {
        "import of `app.web.application`": timed.format("import app.web.application"),
        "import of `models.predictor`": timed.format("import models.predictor"),
    }
    for backbone, folder in checkpoints.items():
        load = timed.format(f"Checkpoint.load(Path({str(folder)!r}))")
        codes[f"load of {backbone}"] = f"from pathlib import Path; from models.checkpoint import Checkpoint; {load}"
    rows = []
    for what, code in codes.items():
        outputs = [
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
            for _ in range(runs + 1)  # the first may find its files on the disk only
        ]
        rows.append([what, f"{min(map(float, outputs)):.2f}"])
    return rows


def _measured(command: list[str]) -> tuple[float, int]:
    """Seconds, and bytes of memory at the worst moment."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{said.decode()}")
    return time.perf_counter() - begun, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
