"""The whole way of one patient: phantom, service, two scans over HTTP, mask, scores, picture. `make demo` runs it.

    python tests/end_to_end/demo.py --out demo-output

Only T2 and FLAIR are sent; the model does without the other two.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np
import numpy.typing as npt

from app.client import Client, ClientError
from models.task import Task

# Far from the seeds that the demo checkpoint was trained and tested on.
SEED = 424_242
GIVEN = ("t2", "flair")
READY_WITHIN = 180.0
"""Seconds for the service to come up: a first start compiles what was just installed."""
SEGMENTED_WITHIN = 900.0
STOPPED_WITHIN = 30.0
NOTICE = "Research software, not a medical device. The demo model has only ever seen synthetic patients."

Labels = npt.NDArray[np.uint8]


class DemoError(RuntimeError):
    """The demo cannot go on. The message says why."""


def make_patient(folder: Path, seed: int, shape: str | None) -> Path:
    """A synthetic patient's folder: four scans and the truth, 240 x 240 x 155 at 1 mm if no shape is given."""
    command = [sys.executable, "-m", "training", "phantom", str(folder), "--subjects", "1", "--seed", str(seed)]
    size = ["--shape", shape] if shape else []
    made = subprocess.run([*command, *size, "--overwrite"], check=False, timeout=300)
    if made.returncode:
        raise DemoError("`passion phantom` failed; its words are above")
    (patient,) = (p for p in folder.iterdir() if p.is_dir())
    return patient


def scan(patient: Path, name: str) -> Path:
    """The file of a modality, or of the truth (`seg`)."""
    return patient / f"{patient.name}_{name}.nii.gz"


@contextmanager
def service(log: Path) -> Iterator[str]:
    """Redis, API and one worker on free ports; yields the API's address, and stops all of it in the end."""
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "up", "--port", "0"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={k: v for k, v in os.environ.items() if k not in {"REDIS_URL", "PASSION_REDIS_URL", "PASSION_STORE"}},
        )
        try:
            yield _address(process, log)
        finally:
            process.terminate()
            try:
                process.wait(STOPPED_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(process: subprocess.Popen[str], log: Path) -> str:
    assert process.stdout is not None
    # A watch that ends the process, because reading a line has no time limit of its own.
    watch = threading.Timer(READY_WITHIN, process.kill)
    watch.start()
    try:
        line = _first_line(process.stdout)
    finally:
        watch.cancel()
    found = re.search(r"http://\S+", line)
    if found is None:
        words = log.read_text(errors="replace").strip().splitlines()[-3:]
        raise DemoError("\n".join([f"the service did not come up; {log} says:", *words]))
    return found.group()


def _first_line(stream: IO[str]) -> str:
    return next((line for line in stream if line.strip()), "")


def segment(url: str, patient: Path, mask: Path) -> dict[str, Any]:
    """Send the given scans, wait, download the mask; the job as it ended."""
    end = time.monotonic() + SEGMENTED_WITHIN
    shown = ""

    def show(job: dict[str, Any]) -> None:
        nonlocal shown
        line = job["stage"] or job["state"]
        if line != shown:
            print(f"  {line}", flush=True)
            shown = line
        if time.monotonic() > end:
            raise DemoError(f"no mask after {SEGMENTED_WITHIN:g} s; the job is {job['state']}")

    with Client(url) as client:
        try:
            job = client.submit({name: scan(patient, name) for name in GIVEN}, {}, lambda _: None)
            print(f"  accepted: {url}{job['links']['self']}", flush=True)
            job = client.wait(job, show)
            client.fetch(job["links"]["mask"], mask)
        except ClientError as error:
            raise DemoError(str(error)) from error
    return job


def dice(found: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> float:
    """Twice the overlap over the sum of both; 1 where both are empty, as published."""
    total = int(found.sum()) + int(truth.sum())
    return 2 * int((found & truth).sum()) / total if total else 1.0


def report(task: Task, found: Labels, truth: Labels, voxel_ml: float, job: dict[str, Any]) -> None:
    """Print a line per region: Dice against the truth, what the model's card expects, and the volumes."""
    expected = (job["expected_dice"] or {}).get("dice", {})
    print(f"\n  {'region':<22} {'Dice':>6} {'expected':>9} {'volume':>10} {'true volume':>12}")
    for region in task.regions:
        one, other = (np.isin(labels, region.labels) for labels in (found, truth))
        mean = expected.get(region.name)
        volumes = f"{job['volumes_ml'][region.name]:>7.1f} mL {other.sum() * voxel_ml:>9.1f} mL"
        words = f"{region.name} {region.description}"
        print(f"  {words:<22} {dice(one, other):>6.3f} {'-' if mean is None else f'{mean:.3f}':>9} {volumes}")


def picture(task: Task, patient: Path, found: Labels, truth: Labels, out: Path) -> None:
    """Three planes through the tumour: FLAIR, FLAIR with the mask, FLAIR with the truth."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    image = nibabel.load(scan(patient, "flair"))
    turn = nibabel.orientations.io_orientation(image.affine)
    volumes = (image.get_fdata(), found, truth)
    flair, mask, true = (nibabel.orientations.apply_orientation(v, turn) for v in volumes)  # right, anterior, superior
    brain = np.argwhere(flair > 0)
    box = tuple(
        slice(max(low - 4, 0), high + 5) for low, high in zip(brain.min(axis=0), brain.max(axis=0), strict=True)
    )
    flair, mask, true = flair[box], mask[box], true[box]
    middle = np.round(np.argwhere(true).mean(axis=0)).astype(int)
    colours = ["#4363d8", "#3cb44b", "#e6194b", "#ffe119", "#f58231"]
    painted = ListedColormap([(0, 0, 0, 0), *colours[: len(task.labels) - 1]])
    top = len(task.labels) - 1
    style = {"cmap": painted, "alpha": 0.6, "vmin": 0, "vmax": top, "origin": "lower", "interpolation": "nearest"}
    figure, axes = plt.subplots(3, 3, figsize=(10, 10.6), layout="constrained", facecolor="black")
    rows = {"FLAIR": None, "mask from T2 and FLAIR": mask, "truth": true}
    for row, (title, labels) in zip(axes, rows.items(), strict=True):
        for axis, plane in zip(row, (2, 1, 0), strict=True):
            # Looked at from the feet and from the front: the patient's left is on the right.
            axis.imshow(np.take(flair, middle[plane], plane).T, cmap="gray", origin="lower")
            if labels is not None:
                overlay = np.take(labels, middle[plane], plane).T
                axis.imshow(overlay, **style)
            if plane != 0:
                axis.invert_xaxis()
            axis.set_axis_off()
        row[1].set_title(title, color="white")
    patches = [Patch(color=c, label=lab.name) for c, lab in zip(colours, task.labels[1:], strict=False)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), labelcolor="white", frameon=False)
    figure.suptitle("A synthetic patient. Research software, not a medical device.", color="white")
    figure.savefig(out, dpi=100)
    plt.close(figure)


def read_labels(task: Task, path: Path) -> tuple[Labels, Any]:
    """Class indices of a label file, and its image."""
    image = nibabel.load(path)
    return task.read_labels(np.asarray(image.dataobj)), image


def run(out: Path, seed: int, shape: str | None) -> None:
    """The demo. Raises `DemoError`."""
    began = time.monotonic()
    print(f"{NOTICE}\n", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    mask_path, picture_path = out / "mask.nii.gz", out / "mask.png"

    print("1. A synthetic patient on real anatomy", flush=True)
    patient = make_patient(out / "patient", seed, shape)

    print("2. The service: Redis, API and a worker, on free ports", flush=True)
    with service(out / "server.log") as url:
        print(f"  ready at {url}", flush=True)
        print(f"3. Its {' and '.join(name.upper() for name in GIVEN)} over HTTP, and the mask back", flush=True)
        job = segment(url, patient, mask_path)

    task = Task.load("glioma")
    found, image = read_labels(task, mask_path)
    truth, _ = read_labels(task, scan(patient, "seg"))
    first = nibabel.load(scan(patient, GIVEN[0]))
    if image.shape != first.shape or not np.array_equal(image.affine, first.affine):
        raise DemoError(f"{mask_path} is not on the grid of {scan(patient, GIVEN[0])}")
    size = " x ".join(str(n) for n in image.shape)
    print(f"4. Opened with nibabel: {size} voxels, {image.get_data_dtype()}, on the grid of the {GIVEN[0].upper()}")
    voxel_ml = abs(float(np.linalg.det(image.affine[:3, :3]))) / 1000
    report(task, found, truth, voxel_ml, job)
    picture(task, patient, found, truth, picture_path)
    print("\n  Expected: the model's own mean on synthetic patients with these two scans.")
    print(f"\nDone in {time.monotonic() - began:.0f} s. To look at: {picture_path}, {mask_path}, {patient}/")


def main() -> int:
    parser = argparse.ArgumentParser(description="One synthetic patient through the whole service.")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for what is left to look at")
    parser.add_argument("--seed", type=int, default=SEED, help="which patient")
    parser.add_argument("--shape", help="voxels as X,Y,Z, for a smaller patient; 240,240,155 if not given")
    arguments = parser.parse_args()
    try:
        run(arguments.out, arguments.seed, arguments.shape)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
