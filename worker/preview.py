"""The picture of a mask: three slices through it, over the first image, in radiological convention."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from nibabel.orientations import apply_orientation, io_orientation
from PIL import Image, ImageDraw, ImageFont

from models.predictor import Segmentation
from models.task import Task
from models.volume import Volume

Bytes: TypeAlias = npt.NDArray[np.uint8]
Bools: TypeAlias = npt.NDArray[np.bool_]

SIDE, FOOT = 280, 24
"""Pixels. With one byte for each, a picture is less than 300 KB however little of it can be compressed."""
MARGIN = 9
"""Pixels from an edge to the middle of its letter, and on to where an image may begin."""
ROOM = SIDE - 4 * MARGIN
VIEWS = ((2, "RLAP"), (1, "RLSI"), (0, "APSI"))
"""Axial, coronal, sagittal: the axis (of R, A, S) that is cut, and what lies left, right, above and below. The
patient's right is on the left, as if seen from the feet or from the front."""
COLOURS = ((0, 158, 115), (240, 228, 66), (213, 94, 0), (86, 180, 233), (204, 121, 167))
"""Told apart by the colour-blind too (Okabe and Ito)."""
GREYS, TINTS = 128, 24
"""Of the palette: greys, then for each colour its tints from dark to bright, then the colour itself."""
WHITE = GREYS - 1
TINT = 0.35
MOST_VALUES = 2**18
"""Voxels that the window of grey values is found from."""
NOTICE = "research software, not for clinical use"


@dataclass(frozen=True)
class Backdrop:
    """An image as a byte per voxel."""

    modality: str
    grey: Bytes
    """(X, Y, Z), 0 where the image is 0, else 1 to WHITE."""

    @classmethod
    def of(cls, modality: str, volume: Volume) -> Backdrop:
        """Between the 1st and the 99.5th percentile of what is not 0."""
        data = volume.data
        values = data[data != 0]
        values = values[:: max(len(values) // MOST_VALUES, 1)]
        low, high = np.percentile(values, (1, 99.5)) if len(values) else (0.0, 1.0)
        grey = (data - np.float32(low)) * np.float32((WHITE - 1) / max(high - low, 1e-12))
        np.clip(grey, 0, WHITE - 1, out=grey)
        grey += 1
        grey[data == 0] = 0
        return cls(modality, grey.astype(np.uint8))


def save_preview(backdrop: Backdrop, segmentation: Segmentation, path: Path) -> None:
    """Write the picture (PNG) whole or not at all; the same mask over the same image gives the same bytes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draw(backdrop, segmentation).save(temporary, "PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def draw(backdrop: Backdrop, segmentation: Segmentation) -> Image.Image:
    """(3 * SIDE) x (SIDE + FOOT) pixels, without the empty space around the head. Where an axis is cut, most voxels of
    its slice are labelled; the middle of the head if none is anywhere. Raises ValueError for an image that is not on
    the mask's grid."""
    if backdrop.grey.shape != segmentation.classes.shape:
        raise ValueError("the image is not on the mask's grid")
    canvas = np.zeros((SIDE + FOOT, SIDE * len(VIEWS)), np.uint8)
    task, letters = segmentation.task, []
    for number, (grey, classes, names) in enumerate(_planes(backdrop.grey, segmentation)):
        height, width = grey.shape
        left, top = number * SIDE + (SIDE - width) // 2, (SIDE - height) // 2
        canvas[top : top + height, left : left + width] = _coloured(grey, classes, task)
        letters += _letters(names, number * SIDE)
    image = Image.fromarray(canvas)
    image.putpalette(_palette())
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for across, down, letter in letters:
        pen.text((across + 1, down + 1), letter, fill=0, font=font, anchor="mm")
        pen.text((across, down), letter, fill=WHITE, font=font, anchor="mm")
    words = [(backdrop.modality, WHITE), *((r.name, _solid(n)) for n, r in enumerate(task.regions))]
    if segmentation.empty:
        words.append(("nothing labelled", WHITE))
    x = float(MARGIN)
    for text, colour in [*words, (NOTICE, WHITE)]:
        pen.text((x, SIDE + FOOT // 2), text, fill=colour, font=font, anchor="lm")
        x += pen.textlength(text, font=font) + 2 * MARGIN
    return image


def _planes(grey: Bytes, segmentation: Segmentation) -> Iterator[tuple[Bytes, Bytes, str]]:
    """Per view: grey values and classes (rows from above, columns from the left), pixels being square and of the same
    size in all views, and the letters."""
    to_ras = io_orientation(segmentation.grid.affine)
    zooms = np.array(segmentation.grid.zooms)[np.argsort(to_ras[:, 0])]
    image: Bytes = apply_orientation(grey, to_ras)
    classes: Bytes = apply_orientation(segmentation.classes, to_ras)
    head = _box((image != 0) | (classes != 0))
    image, classes = image[head], classes[head]
    sizes = zooms * image.shape
    scale = ROOM / float(sizes.max())
    labelled = classes != 0
    for axis, letters in VIEWS:
        across, up = (a for a in range(3) if a != axis)
        index = image.shape[axis] // 2 if segmentation.empty else int(labelled.sum((across, up)).argmax())
        width, height = (max(1, round(float(sizes[a]) * scale)) for a in (across, up))
        of_image = _cut(image, axis, index).resize((width, height), Image.Resampling.BILINEAR)
        of_classes = _cut(classes, axis, index).resize((width, height), Image.Resampling.NEAREST)
        yield np.asarray(of_image), np.asarray(of_classes), letters


def _cut(volume: Bytes, axis: int, index: int) -> Image.Image:
    """A slice as it is looked at: columns to the left and rows downwards go against R, A and S."""
    return Image.fromarray(np.ascontiguousarray(np.take(volume, index, axis)[::-1, ::-1].T))


def _box(shown: Bools) -> tuple[slice, ...]:
    """What of an image is not empty space around it; all of it if there is nothing else."""
    places = []
    for axis, size in enumerate(shown.shape):
        found = np.flatnonzero(shown.any(axis=tuple(a for a in range(3) if a != axis)))
        places.append(slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, size))
    return tuple(places)


def _coloured(grey: Bytes, classes: Bytes, task: Task) -> Bytes:
    """Indices into the palette: each region tinted and outlined, the smaller over the larger."""
    indices = grey.copy()
    order = sorted(range(len(task.regions)), key=lambda n: -len(task.regions[n].labels))
    inside = {n: np.isin(classes, task.regions[n].labels) for n in order}
    tint = (grey.astype(np.uint16) * (TINTS - 1) // WHITE).astype(np.uint8)
    for n, region in inside.items():
        indices[region] = _solid(n) - TINTS + tint[region]
    for n, region in inside.items():
        indices[region & ~_eroded(region)] = _solid(n)
    return indices


def _eroded(region: Bools) -> Bools:
    padded = np.pad(region, 1)
    eroded: Bools = region & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return eroded


def _solid(region: int) -> int:
    """Index of a region's colour, by its place among the task's."""
    return GREYS + region % len(COLOURS) * (TINTS + 1) + TINTS


def _palette() -> list[int]:
    grey = np.linspace(0, 255, GREYS)
    rows = [np.stack([grey] * 3, axis=1)]
    for colour in np.array(COLOURS, float):
        tints = np.linspace(0, 255, TINTS)[:, None] * (1 - TINT) + colour * TINT
        rows += [tints, colour[None]]
    return [int(v) for v in np.concatenate(rows).round().ravel()]


def _letters(names: str, start: int) -> list[tuple[int, int, str]]:
    middle, far = SIDE // 2, SIDE - MARGIN
    places = ((MARGIN, middle), (far, middle), (middle, MARGIN), (middle, far))
    return [(start + x, y, name) for (x, y), name in zip(places, names, strict=True)]
