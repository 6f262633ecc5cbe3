"""Random crops and their augmentation, as published: crop, rotation, intensity, flips."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import rotate

Float = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]

OUTSIDE = -1.0
"""What a rotation brings into an image from outside: about the background of a normalised scan."""
PLANES = ((0, 1), (1, 2), (0, 2))


def crop_start(
    shape: tuple[int, ...],
    size: tuple[int, int, int],
    rng: np.random.Generator,
    centre: npt.NDArray[np.intp] | None = None,
) -> tuple[int, ...]:
    """First voxel of a crop of `size` in a volume of `shape`: uniform, or around `centre` as far as the volume goes."""
    room = np.maximum(np.array(shape) - size, 0)
    start = rng.integers(0, room + 1)  # drawn in any case, so that later draws do not depend on the choice
    if centre is not None:
        start = np.clip(centre - np.array(size) // 2, 0, room)
    return tuple(int(s) for s in start)


def augment(images: Float, labels: Labels, rng: np.random.Generator) -> tuple[Float, Labels]:
    """Augment images (P, X, Y, Z), normalised, and labels (X, Y, Z) alike.

    Rotation in one random plane by a whole number of degrees in [-10, 10), nearest voxel, outside -1 (labels 0);
    per channel a scale U(.9, 1.1) and a shift U(-.1, .1); a flip of each axis with probability 1/2.
    """
    plane = PLANES[rng.integers(len(PLANES))]
    angle = int(rng.integers(-10, 10))
    if angle:
        images = np.stack([_rotate(image, angle, plane, OUTSIDE) for image in images])
        labels = _rotate(labels, angle, plane, 0)
    channels = (len(images), 1, 1, 1)
    scale = rng.uniform(0.9, 1.1, channels).astype(np.float32)
    shift = rng.uniform(-0.1, 0.1, channels).astype(np.float32)
    images = images * scale + shift
    for axis in range(3):
        if rng.random() < 0.5:
            images, labels = np.flip(images, axis + 1), np.flip(labels, axis)
    return np.ascontiguousarray(images), np.ascontiguousarray(labels)


def _rotate(array: npt.NDArray[Any], angle: int, plane: tuple[int, int], fill: float) -> npt.NDArray[Any]:
    turned: npt.NDArray[Any] = rotate(array, angle, axes=plane, reshape=False, order=0, cval=fill)
    return turned
