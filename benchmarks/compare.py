"""Ours against the frozen straightforward implementation, side by side in one run: `make bench`.

    python benchmarks/compare.py --out bench.json

For every backbone and number of modalities a training step at the published crop and a segmented box, each in a process
of its own, ours and theirs in turn. Prints a table, and writes every figure with machine and date as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import straightforward

from training import atomic
from training.experiments.machine import git_state, machine
from training.experiments.tables import markdown

HERE = Path(__file__).parent
STEP, BOX = "training step", "segmented box"
PRESENT = {4: ["flair", "t1ce", "t1", "t2"], 3: ["flair", "t1", "t2"], 2: ["flair", "t1"], 1: ["flair"]}
"""By number, modalities as mr2468 leaves them most often."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", choices=list(straightforward.NETWORKS))
    parser.add_argument("--present", nargs="+", type=int, choices=list(PRESENT), default=[4, 3, 2, 1])
    parser.add_argument("--what", nargs="+", choices=["step", "box"], default=["step", "box"])
    parser.add_argument("--crop", type=int, default=80)
    parser.add_argument("--box", type=int, default=120, help="voxels along each axis of the box that is segmented")
    parser.add_argument("--steps", type=int, default=4, help="training steps; the first is not counted")
    parser.add_argument("--runs", type=int, default=4, help="of a box; the first is not counted")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    arguments = parser.parse_args()

    rows: list[dict] = []
    for backbone in arguments.backbone or straightforward.NETWORKS:
        for number in arguments.present:
            common = ["--backbone", backbone, "--present", *PRESENT[number], "--device", arguments.device]
            step = ["training_step.py", *common, "--crop", str(arguments.crop), "--steps", str(arguments.steps)]
            box = ["inference.py", *common, "--box", str(arguments.box), "--runs", str(arguments.runs)]
            wanted = {"step": (STEP, step), "box": (BOX, box)}
            for what, command in (wanted[name] for name in arguments.what):
                ours, theirs = (measure([*command, "--implementation", i]) for i in ("ours", "straightforward"))
                rows.append({"what": what, "modalities": number, "ours": ours, "straightforward": theirs})
                print(f"{what}, {backbone}, {number}: {_ratio(rows[-1], 'best_warm_s'):.1f}x", flush=True)
    print("\n" + table(rows))
    record = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python benchmarks/compare.py", *sys.argv[1:]]),
        "machine": machine(),
        "code": git_state(),
        "rows": rows,
    }
    atomic.write_text(arguments.out, json.dumps(record, indent=1) + "\n")


def table(rows: list[dict]) -> str:
    """Markdown: seconds and GiB of both, and how many times less ours takes."""
    header = ["", "backbone", "modalities", "ours, s", "straightforward, s", "times faster", "ours, GiB"]
    header += ["straightforward, GiB", "times smaller"]
    lines = []
    for row in rows:
        ours, theirs = row["ours"], row["straightforward"]
        lines.append(
            [row["what"], ours["backbone"], str(row["modalities"])]
            + [f"{r['best_warm_s']:.2f}" for r in (ours, theirs)]
            + [f"**{_ratio(row, 'best_warm_s'):.1f}**"]
            + [f"{r['peak_gib']:.2f}" for r in (ours, theirs)]
            + [f"**{_ratio(row, 'peak_gib'):.1f}**"]
        )
    return markdown(header, lines, left=3)


def _ratio(row: dict, figure: str) -> float:
    return row["straightforward"][figure] / row["ours"][figure]


def measure(command: list[str]) -> dict:
    """The figures that a script beside this one prints, with its options, in a process of its own."""
    script, *options = command
    done = subprocess.run([sys.executable, HERE / script, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr or done.stdout}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
