"""Random crops and their augmentation, as published: crop, rotation, intensity, flips."""

from __future__ import annotations

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
    centre: tuple[int, int, int] | None = None,
) -> tuple[int, ...]:
    """First voxel of a crop of `size` in a volume of `shape`: uniform, or around `centre` as far as the volume goes."""
    room = np.maximum(np.array(shape) - size, 0)
    start = rng.integers(0, room + 1)  # drawn in any case, so that later draws do not depend on the choice
    if centre is not None:
        start = np.clip(np.array(centre) - np.array(size) // 2, 0, room)
    return tuple(int(s) for s in start)


def augment(images: Float, labels: Labels, rng: np.random.Generator) -> tuple[Float, Labels]:
    """Augment images (P, X, Y, Z), normalised, and labels (X, Y, Z) alike; both are new arrays.

    Rotation in one random plane by a whole number of degrees in [-10, 10), nearest voxel, outside -1 (labels 0);
    per channel a scale U(.9, 1.1) and a shift U(-.1, .1); a flip of each axis with probability 1/2.
    """
    plane = PLANES[rng.integers(len(PLANES))]
    angle = int(rng.integers(-10, 10))
    channels = (len(images), 1, 1, 1)
    scale = rng.uniform(0.9, 1.1, channels).astype(np.float32)
    shift = rng.uniform(-0.1, 0.1, channels).astype(np.float32)
    flipped = [bool(rng.random() < 0.5) for _ in range(3)]

    # Rotation and flips only move voxels: where each comes from is found once, for all channels and the labels.
    source = _source(labels.shape, plane, angle, flipped)
    outside = source < 0
    moved = np.take(images.reshape(len(images), -1), source, axis=1, mode="clip")
    moved_labels = np.take(labels.reshape(-1), source, mode="clip")
    np.copyto(moved, np.float32(OUTSIDE), where=outside)
    np.copyto(moved_labels, np.uint8(0), where=outside)
    moved *= scale
    moved += shift
    return moved, moved_labels


def _source(shape: tuple[int, ...], plane: tuple[int, int], angle: int, flipped: list[bool]) -> npt.NDArray[np.intp]:
    """For every voxel (X, Y, Z) the place, in C order, that it comes from; negative where that is outside."""
    strides = (shape[1] * shape[2], shape[2], 1)
    (a, b), other = plane, 3 - sum(plane)
    # scipy turns a picture of the plane's own numbers: its choice of the nearest voxel, for the price of one slice.
    numbers = np.arange(shape[a] * shape[b], dtype=np.intp).reshape(shape[a], shape[b])
    turned = rotate(numbers, angle, reshape=False, order=0, cval=-1) if angle else numbers
    row, column = np.divmod(turned, shape[b])
    in_plane = np.where(turned < 0, np.iinfo(np.intp).min // 2, row * strides[a] + column * strides[b])
    across = np.arange(shape[other], dtype=np.intp) * strides[other]
    in_plane = in_plane[tuple(slice(None, None, -1 if flipped[axis] else 1) for axis in plane)]
    if flipped[other]:
        across = across[::-1]
    source: npt.NDArray[np.intp] = np.expand_dims(in_plane, other) + np.expand_dims(across, plane)
    return source
