"""Synthetic patients of two other tasks, small: hearts in thick slices as MyoPS 2020, prostates in nnU-Net's layout."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import nibabel as nib
import numpy as np

from models.task import Task

MYOPS = Task.load("myops2020")
HEART = Task.model_validate(
    MYOPS.model_dump() | {"patch_size": (16, 16, 16), "spacing": (3.0, 3.0, 5.0), "min_crop": 16}
)
"""MyoPS on a coarse grid with the smallest patch."""
HEART_SHAPE, HEART_ZOOMS = (48, 48, 5), (1.5, 1.5, 15.0)
SUFFIX = {"bssfp": "C0", "lge": "DE", "t2": "T2"}

PROSTATE = Task.model_validate(
    Task.load("prostate").model_dump() | {"patch_size": (16, 16, 16), "spacing": (3.0, 3.0, 3.0), "min_crop": 16}
)
PROSTATE_ZOOMS = (1.5, 1.5, 3.0)


def heart(seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """File values (48, 48, 5) int16 of one heart, and an image of each sequence with noise."""
    rng = np.random.default_rng([seed, 7])
    x, y = np.meshgrid(np.arange(48.0), np.arange(48.0), indexing="ij")
    values = np.zeros(HEART_SHAPE, np.int16)
    for k in range(HEART_SHAPE[2]):
        centre, radius = 24 + rng.uniform(-2, 2, 2), 14 - 1.5 * k
        r = np.hypot(x - centre[0], y - centre[1])
        angle = np.arctan2(y - centre[1], x - centre[0])
        wall = (r >= radius - 5) & (r < radius)
        values[np.hypot(x - centre[0] + radius + 6, (y - centre[1]) / 1.5) < 7, k] = 600
        values[r < radius, k] = 500
        values[wall, k] = 200
        values[wall & (np.abs(angle) < 1.0), k] = 1220
        values[wall & (np.abs(angle) < 0.6), k] = 2221
    shades = {
        "bssfp": {0: 60, 200: 90, 500: 220, 600: 210, 1220: 95, 2221: 90},
        "lge": {0: 50, 200: 20, 500: 120, 600: 110, 1220: 40, 2221: 240},
        "t2": {0: 60, 200: 80, 500: 30, 600: 35, 1220: 200, 2221: 150},
    }
    images = {}
    for name, shade in shades.items():
        image = sum(value * (values == label) for label, value in shade.items())
        images[name] = np.clip(image + rng.normal(0, 8, HEART_SHAPE), 1, None).astype(np.float32)
    return values, images


def short_axis(turned: bool) -> np.ndarray:
    """The affine of a short-axis stack, oblique; `turned`: so much that another body axis is nearest to the slices'."""
    from scipy.spatial.transform import Rotation

    turn = Rotation.from_euler("xy", [20, 65] if turned else [65, 20], degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(HEART_ZOOMS)
    affine[:3, 3] = (-40, 25, 10)
    return affine


def write_myops(folder: Path, case: str, seed: int, sequences: Iterable[str] = tuple(SUFFIX)) -> None:
    """One subject as MyoPS 2020 lays them out: images and gold standards in folders of their own."""
    values, images = heart(seed)
    affine = short_axis(turned=seed % 2 == 1)
    for part in ("train25", "train25_myops_gd"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name in sequences:
        nib.save(nib.Nifti1Image(images[name], affine), folder / "train25" / f"{case}_{SUFFIX[name]}.nii.gz")
    nib.save(nib.Nifti1Image(values, affine), folder / "train25_myops_gd" / f"{case}_gd.nii.gz")


def prostate(seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """File values (32, 32, 16) uint8 of one prostate, and its T2 and ADC."""
    rng = np.random.default_rng([seed, 8])
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (32, 32, 16)], indexing="ij"))
    grid = grid - rng.uniform(-0.1, 0.1, (3, 1, 1, 1))
    gland, inner = (grid**2).sum(0) < 0.5, ((grid - np.array([0, 0.15, 0])[:, None, None, None]) ** 2).sum(0) < 0.2
    values = np.where(inner, 2, np.where(gland, 1, 0)).astype(np.uint8)
    noise = rng.normal(0, 6, (2, *values.shape))
    t2 = 80 + 120 * (values == 1) + 40 * (values == 2) + noise[0]
    adc = 60 + 90 * (values == 1) + 50 * (values == 2) + noise[1]
    return values, {"T2": t2.clip(1).astype(np.float32), "ADC": adc.clip(1).astype(np.float32)}


def write_nnunet(folder: Path, cases: dict[str, tuple[str, ...]]) -> Path:
    """A data set in nnU-Net's layout (version 2) with these channels of each case."""
    channels = ("T2", "ADC")
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    affine = np.diag([-PROSTATE_ZOOMS[0], -PROSTATE_ZOOMS[1], PROSTATE_ZOOMS[2], 1])
    for seed, (case, has) in enumerate(cases.items()):
        values, images = prostate(seed)
        for number, name in enumerate(channels):
            if name in has:
                nib.save(nib.Nifti1Image(images[name], affine), folder / "imagesTr" / f"{case}_{number:04d}.nii.gz")
        nib.save(nib.Nifti1Image(values, affine), folder / "labelsTr" / f"{case}.nii.gz")
    description = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": {"background": 0, "PZ": 1, "TZ": 2},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder
