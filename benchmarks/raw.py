"""Scans as they come from the scanner: how well they are registered, stripped and segmented, on phantoms.

python -m benchmarks.raw registration --patients 3
python -m benchmarks.raw masks --patients 5
python -m benchmarks.raw heads --patients 2
python -m benchmarks.raw template T1_WITH_SKULL.nii T1_STRIPPED.nii
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.heads import Motion, scanned, shaded, volumes_of, with_skull
from models.checkpoint import Checkpoint
from models.predictor import Predictor
from models.raw.look import Look
from models.raw.prepare import NONE, RAW
from models.raw.registration import register
from models.raw.skull import brain_of
from models.volume import Volume, VolumeError
from training.metrics import dice
from training.phantom import make_subject

DEMO = Path("models/checkpoints/glioma-phantom-rfnet")
SPACINGS = {"t1": (1.0, 1.0, 1.0), "t1ce": (1.0, 1.0, 1.0), "flair": (0.9, 0.9, 5.0), "t2": (0.9, 5.0, 0.9)}
SHARES = (0.25, 0.5, 1.0)
"""Of the largest motion: 20 mm and 15 degrees."""


def motion(rng: np.random.Generator, share: float) -> Motion:
    """A motion of the given share of 20 mm and 15 degrees, about a random axis."""
    axis, way = rng.standard_normal((2, 3))
    degrees, mm = 15 * share * axis / np.linalg.norm(axis), 20 * share * way / np.linalg.norm(way)
    return Motion(tuple(degrees), tuple(mm))


def error_mm(found: np.ndarray, true: np.ndarray, volume: Volume) -> float:
    """Mean distance (mm) over the brain's voxels between where two motions put them."""
    index = np.argwhere(volume.data > 0)[::50]
    places = index @ volume.grid.affine[:3, :3].T + volume.grid.affine[:3, 3]
    change = found - true
    return float(np.linalg.norm(places @ change[:3, :3].T + change[:3, 3], axis=1).mean())


def registration(patients: int) -> None:
    print("| input | contrast | voxels, mm | motion | mean error, mm | worst, mm | refused | CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    for skull in (False, True):
        found: dict[tuple[str, float], list[tuple[float, float]]] = {}
        for index in range(1, patients + 1):
            brains = volumes_of(make_subject(31, index))
            scans = {name: with_skull(name, v, index) if skull else v for name, v in brains.items()}
            for name in ("t1ce", "flair", "t2"):
                for number, share in enumerate(SHARES):
                    rng = np.random.default_rng([index, number, len(name)])
                    moved = motion(rng, share)
                    scan = scanned(scans[name], moved, SPACINGS[name])
                    start = time.process_time()
                    try:
                        result = register(scans["t1"], scan, name, "t1")
                        off = error_mm(result.matrix, moved.matrix(scans[name].grid), brains["t1"])
                    except VolumeError as error:
                        print(f"<!-- {error} -->")
                        off = float("nan")
                    found.setdefault((name, share), []).append((off, time.process_time() - start))
        for (name, share), rows in found.items():
            offs, seconds = np.array(rows).T
            size = " x ".join(f"{s:g}" for s in SPACINGS[name])
            refused = int(np.isnan(offs).sum())
            print(
                f"| {'head' if skull else 'stripped'} | {name} | {size} | {20 * share:g} mm, {15 * share:g} degrees | "
                f"{np.nanmean(offs):.2f} | {np.nanmax(offs):.2f} | {refused} | {seconds.mean():.1f} |",
                flush=True,
            )


def masks(patients: int) -> None:
    predictor = Predictor(Checkpoint.load(DEMO))
    ways: dict[str, list[dict[str, float]]] = {}
    seconds: dict[str, list[float]] = {}
    regions = predictor.task.regions
    for index in range(1, patients + 1):
        subject = make_subject(32, index)
        aligned = volumes_of(subject)
        truth = predictor.task.read_labels(subject.labels)
        rng = np.random.default_rng(index)
        raw = {
            name: v if name == "t1" else scanned(v, motion(rng, float(rng.uniform(0.2, 1))), SPACINGS[name])
            for name, v in aligned.items()
        }
        still = {n: v if n == "t1" else scanned(v, Motion(), SPACINGS[n]) for n, v in aligned.items()}
        heads = {n: shaded(with_skull(n, v, index), 0.2, index) for n, v in aligned.items()}
        for way, given, mode in (
            ("aligned, 1 mm", aligned, NONE),
            ("aligned, thick slices", still, NONE),
            ("moved, thick slices, none", raw, NONE),
            ("moved, thick slices, raw", raw, RAW),
            ("head on one grid, raw", heads, RAW),
        ):
            files = {"t1": given["t1"], **given}
            start = time.process_time()
            try:
                classes = predictor.segment(files, preprocess=mode).classes
            except VolumeError as error:
                print(f"<!-- {way}: {error} -->")
                continue
            seconds.setdefault(way, []).append(time.process_time() - start)
            score = {r.name: dice(np.isin(classes, r.labels), np.isin(truth, r.labels)) for r in regions}
            ways.setdefault(way, []).append(score)
    print(f"| input | patients | {' | '.join(r.name for r in regions)} | CPU s |")
    print("|---|---|" + "---|" * (len(regions) + 1))
    for way, scores in ways.items():
        means = " | ".join(f"{np.nanmean([s[r.name] for s in scores]):.3f}" for r in regions)
        print(f"| {way} | {len(scores)} | {means} | {np.mean(seconds[way]):.1f} |")


def heads(patients: int) -> None:
    print("| contrast | Dice of the brain, mean | least | CPU s |")
    print("|---|---|---|---|")
    found: dict[str, list[tuple[float, float]]] = {}
    for index in range(1, patients + 1):
        for name, volume in volumes_of(make_subject(33, index)).items():
            found.setdefault(name, []).append(_stripped(name, with_skull(name, volume, index), volume.data > 0))
    _print(found)


def template(head: Path, stripped: Path) -> None:
    """A real T1 template with its skull, and what a T2 of it would look like: brain and skin inverted."""
    whole, brain = Volume.load(head), Volume.load(stripped).data > 0
    print(f"<!-- looks like a head: {Look.at(whole).head}; stripped: {Look.at(Volume.load(stripped)).head} -->")
    bright = float(np.quantile(whole.data[brain], 0.98))
    inverted = np.where(whole.data > 0.15 * bright, np.clip(1.3 * bright - whole.data, 0.1 * bright, None), whole.data)
    print("| contrast | Dice of the brain, mean | least | CPU s |")
    print("|---|---|---|---|")
    _print(
        {
            "t1": [_stripped("t1", whole, brain)],
            "t1, inverted": [_stripped("t2", replace(whole, data=inverted.astype(np.float32)), brain)],
        }
    )


def _stripped(name: str, head: Volume, brain: np.ndarray) -> tuple[float, float]:
    start = time.process_time()
    try:
        return dice(brain_of(name, head), brain), time.process_time() - start
    except VolumeError as error:
        print(f"<!-- {error} -->")
        return 0.0, time.process_time() - start


def _print(found: dict[str, list[tuple[float, float]]]) -> None:
    for name, rows in found.items():
        scores, seconds = np.array(rows).T
        print(f"| {name} | {scores.mean():.3f} | {scores.min():.3f} | {seconds.mean():.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["registration", "masks", "heads", "template"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--patients", type=int, default=3)
    given = parser.parse_args()
    if given.what == "template":
        template(*given.files)
    else:
        {"registration": registration, "masks": masks, "heads": heads}[given.what](given.patients)


if __name__ == "__main__":
    main()
