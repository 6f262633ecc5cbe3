"""Heads to try raw scans on: a phantom's brain in fluid, bone and scalp, in noisy air, moved and resampled like a scan.

Synthetic, as the brain in them is: the layers have a head's thickness and order, but no face, no neck and no marrow of
their own shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from models.raw.similarity import turn_about
from models.volume import Grid, Volume

# Relative to the brightest tissue of each contrast: fluid around the brain, bone, marrow, fat and muscle of the scalp.
LAYERS = {
    #         fluid bone  marrow fat  muscle
    "flair": (0.15, 0.06, 0.25, 0.55, 0.35),
    "t1ce": (0.22, 0.06, 0.45, 1.15, 0.50),
    "t1": (0.20, 0.06, 0.45, 1.20, 0.45),
    "t2": (1.10, 0.06, 0.30, 0.65, 0.22),
}
NOISE = 0.02


@dataclass(frozen=True)
class Motion:
    """How a patient lay for one scan: turned about the grid's middle, then shifted."""

    degrees: tuple[float, float, float] = (0.0, 0.0, 0.0)
    mm: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def matrix(self, grid: Grid) -> np.ndarray:
        """(4, 4): mm where the patient lay at first to mm where the patient lies now."""
        middle = grid.affine[:3, :3] @ ((np.array(grid.shape) - 1) / 2) + grid.affine[:3, 3]
        return turn_about(middle, np.array(self.degrees), np.array(self.mm))


def grid_of(shape, affine) -> Grid:
    """A grid with a plain header."""
    import nibabel as nib

    image = nib.Nifti1Image(np.zeros(shape, np.uint8), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    return Grid.of(image)


def volumes_of(subject) -> dict[str, Volume]:
    """A phantom's scans as they are: stripped, on one grid."""
    grid = grid_of(subject.labels.shape, subject.affine)
    return {name: Volume(image.astype(np.float32), grid) for name, image in subject.images.items()}


def with_skull(name: str, volume: Volume, seed: int = 0) -> Volume:
    """A stripped phantom scan in a head. The field of view must leave 20 mm around the brain for it to be whole."""
    rng = np.random.default_rng(seed)
    zooms = volume.grid.zooms
    brain = volume.data > 0
    bright = float(np.quantile(volume.data[brain], 0.9))
    smooth = ndimage.gaussian_filter(brain.astype(np.float32), [4 / z for z in zooms]) > 0.4
    outside = ndimage.distance_transform_edt(~(smooth | brain), sampling=zooms)
    bumps = ndimage.gaussian_filter(rng.standard_normal(brain.shape), [12 / z for z in zooms])
    outside += 1.5 * bumps / max(float(bumps.std()), 1e-9) * (outside > 0)
    fluid, bone, marrow, fat, muscle = (level * bright for level in LAYERS[name])
    head = volume.data.copy()
    for low, high, level in (
        *((0, 2.5, fluid), (2.5, 4.5, bone), (4.5, 7, marrow), (7, 9, bone)),
        *((9, 11, muscle), (11, 15, fat), (15, 16.5, muscle)),
    ):
        head[~brain & (outside > low) & (outside <= high)] = level
    head[~brain & (outside <= 0)] = fluid
    head = ndimage.gaussian_filter(head, [0.4 / z for z in zooms])
    noise = rng.standard_normal((2, *head.shape)).astype(np.float32) * np.float32(NOISE * bright)
    return Volume(np.hypot(head + noise[0], noise[1]).astype(np.float32), volume.grid)


def shaded(volume: Volume, strength: float, seed: int = 0) -> Volume:
    """A scan under a coil's smooth bias field: exp of a field with this standard deviation."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal(volume.data.shape), [40 / z for z in volume.grid.zooms])
    field *= strength / float(field.std())
    return Volume((volume.data * np.exp(field - field.mean())).astype(np.float32), volume.grid)


def scanned(volume: Volume, motion: Motion, spacing: tuple[float, float, float], margin: float = 10.0) -> Volume:
    """The volume as a scan of its own: the patient moved, voxels of another size, each the mean over its extent.

    The header knows the scanner, not the patient: it does not tell of the motion. `margin`: mm beyond the first field
    of view on each side, so that nothing is cut off.
    """
    grid = volume.grid
    zooms = np.array(grid.zooms)
    shape = np.ceil((np.array(grid.shape) * zooms + 2 * margin) / spacing).astype(int)
    step = np.diag([*(np.array(spacing) / zooms), 1.0])
    step[:3, 3] = (np.array(spacing) / zooms - 1) / 2 - margin / zooms
    affine = grid.affine @ step
    sigmas = [0.3 * max(s / z - 1, 0) for s, z in zip(spacing, zooms, strict=True)]
    blurred = ndimage.gaussian_filter(volume.data, sigmas)
    to_source = np.linalg.inv(grid.affine) @ np.linalg.inv(motion.matrix(grid)) @ affine
    data = ndimage.affine_transform(
        blurred, to_source[:3, :3], to_source[:3, 3], tuple(shape), np.float32, order=1, cval=0.0
    )
    return Volume(data, grid_of(tuple(int(n) for n in shape), affine))
