"""`PhantomSubject`: one synthetic patient, made from a seed and an index, and written as a BraTS folder."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import nibabel
import numpy as np
import numpy.typing as npt

from training.phantom.anatomy import load_anatomy
from training.phantom.contrast import CONTRASTS, Scan, Scene
from training.phantom.fields import SmoothField
from training.phantom.pose import Axes, Pose
from training.phantom.tumour import Tumour, grow_tumour

Floats = npt.NDArray[np.float32]
_Pixel = TypeVar("_Pixel", np.uint8, np.uint16)

FULL_SHAPE = (240, 240, 155)
NECROSIS, OEDEMA, ENHANCING = 1, 2, 4
"""Label values of BraTS 2018-2021."""

_COMPRESSION = 3  # noise does not compress: more effort makes the files hardly smaller


@dataclass(frozen=True)
class PhantomSubject:
    """Images uint16 and labels uint8, all of one shape; `affine` maps voxels to mm as BraTS does (axes L, P, S)."""

    id: str
    images: dict[str, npt.NDArray[np.uint16]]
    labels: npt.NDArray[np.uint8]
    affine: npt.NDArray[np.float64]


def subject_id(index: int) -> str:
    """The id of patient number `index` of a collection."""
    return f"Phantom_{index:04d}"


def make_subject(
    seed: int, index: int, shape: tuple[int, int, int] = FULL_SHAPE, spacing: float = 1.0
) -> PhantomSubject:
    """Patient number `index` of the collection `seed`, on a grid of `shape` voxels of `spacing` mm.

    The patient depends on (seed, index) alone: another grid shows the same brain and tumour (with other noise). A
    field of view smaller than the brain shrinks the patient, tumour included, until it fits.
    Raises `UserError` without the ICBM template (the `phantom` extra).
    """
    streams = np.random.SeedSequence([seed, index]).spawn(5)
    anatomy_rng, tumour_rng, scene_rng, scan_rng, noise_rng = (np.random.default_rng(s) for s in streams)
    anatomy = load_anatomy(spacing)
    pose = Pose(anatomy_rng)
    low, high = pose.extent(anatomy)
    tumour = grow_tumour(tumour_rng, pose, low, high)

    shrink, offset = pose.place(low, high, np.array(shape, np.float32) * np.float32(spacing))
    box, axes = _box(shape, spacing, shrink, offset, low, high)
    template = pose.to_template(axes)
    brain = anatomy.sample(anatomy.brain, template) > 0.5
    here = np.stack([np.broadcast_to(a, brain.shape)[brain] for a in np.meshgrid(*axes, indexing="ij", sparse=True)])
    tissues = anatomy.tissues(pose.swell(template[:, brain], here, tumour.swelling))
    del template
    lesion, labels_in_brain = _lesion(tumour, here, spacing / shrink)
    del here
    scene = _scene(scene_rng, tissues, lesion, axes, brain)

    images = {}
    for name in CONTRASTS:
        scan = Scan.draw(scan_rng, name)
        bias = SmoothField(scan_rng, 65.0).on(*axes)[brain]
        images[name] = _paste(scan.acquire(noise_rng, scene, brain, bias, spacing), shape, box)
    labels = np.zeros(brain.shape, np.uint8)
    labels[brain] = labels_in_brain
    affine = np.diag([-spacing, -spacing, spacing, 1.0])
    affine[1, 3] = spacing * (shape[1] - 1)
    return PhantomSubject(subject_id(index), images, _paste(labels, shape, box), affine)


def write_subject(folder: Path, subject: PhantomSubject) -> Path:
    """Write `folder/<id>/<id>_<contrast>.nii.gz` and `_seg`, whole or not at all; an existing folder is replaced.

    The files' bytes depend on the subject alone (gzip carries no time stamp). Returns the subject's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / subject.id
    temporary = Path(tempfile.mkdtemp(prefix=f".{subject.id}.", dir=folder))
    try:
        for name, image in subject.images.items():
            _write(temporary / f"{subject.id}_{name}.nii.gz", image, subject.affine)
        _write(temporary / f"{subject.id}_seg.nii.gz", subject.labels, subject.affine)
        temporary.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _box(
    shape: tuple[int, int, int], spacing: float, shrink: float, offset: Floats, low: Floats, high: Floats
) -> tuple[tuple[slice, slice, slice], Axes]:
    """The part of the grid the brain can reach, and the patient positions (mm) of its voxels along each axis."""
    slices, axes = [], []
    for axis, size in enumerate(shape):
        position = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(spacing)
        if axis < 2:  # voxel indices grow towards left and posterior, patient mm towards right and anterior
            position = np.float32(size * spacing) - position
        patient = (position - offset[axis]) / np.float32(shrink)
        inside = np.flatnonzero((patient >= low[axis]) & (patient <= high[axis]))
        slices.append(slice(int(inside[0]), int(inside[-1]) + 1))
        axes.append(patient[slices[-1]])
    return (slices[0], slices[1], slices[2]), (axes[0], axes[1], axes[2])


def _lesion(tumour: Tumour, here: Floats, voxel: float) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """Soft fractions (3, N) of necrosis, oedema and enhancing rim, and the label value (N), at the brain's voxels.

    `voxel` (mm, patient) sets how far a boundary is smeared.
    """
    near = np.ones(here.shape[1], bool)
    for position, axis in zip(here, tumour.axes, strict=True):
        near &= (position > axis[0]) & (position < axis[-1])
    core, necrosis, oedema = tumour.levels(here[:, near])
    fractions = np.zeros((3, here.shape[1]), np.float32)
    labels = np.zeros(here.shape[1], np.uint8)

    within_core = _inside(core, 0.45 * voxel)
    dead = _inside(necrosis, 0.45 * voxel) if tumour.enhancing else np.ones_like(within_core)
    # Oedema fades: dense beside the core, thinner and softer at its outer edge.
    dense = np.clip(0.80 + 0.02 * -oedema, 0.80, 1)
    fractions[0, near] = within_core * dead
    fractions[2, near] = within_core * (1 - dead)
    fractions[1, near] = (1 - within_core) * _inside(oedema, 0.8 + 0.3 * voxel) * dense
    label = np.where(oedema < 0, OEDEMA, 0)
    label = np.where(core < 0, np.where(necrosis < 0, NECROSIS, ENHANCING) if tumour.enhancing else NECROSIS, label)
    labels[near] = label
    return fractions, labels


def _inside(level: Floats, softness: float) -> Floats:
    inside: Floats = 1 / (1 + np.exp(np.clip(level / np.float32(softness), -30, 30)))
    return inside


def _scene(
    rng: np.random.Generator, tissues: Floats, lesion: Floats, axes: Axes, brain: npt.NDArray[np.bool_]
) -> Scene:
    healthy = 1 - lesion.sum(axis=0)
    texture = SmoothField(rng, 4.0).on(*axes)[brain]
    along = SmoothField(rng, 11.0).on(*axes)[brain] ** 2 + SmoothField(rng, 11.0).on(*axes)[brain] ** 2
    # Two level sets meet in curves: vessels, in the fluid around the brain.
    vessels = np.exp(-along / np.float32(2 * 0.13**2)) * np.minimum(1, 1.5 * tissues[0]) * healthy
    spots = SmoothField(rng, 5.0).on(*axes)[brain] - np.float32(rng.uniform(2.7, 4.0))
    hyperintensities = np.clip(3 * spots, 0, 1) * tissues[2] * healthy
    return Scene(np.concatenate([tissues * healthy, lesion]), texture, vessels, hyperintensities)


def _paste(part: npt.NDArray[_Pixel], shape: tuple[int, int, int], box: tuple[slice, ...]) -> npt.NDArray[_Pixel]:
    whole = np.zeros(shape, part.dtype)
    whole[box] = part
    return whole


def _write(path: Path, data: npt.NDArray[np.generic], affine: npt.NDArray[np.float64]) -> None:
    image = nibabel.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    with path.open("wb") as file, gzip.GzipFile("", "wb", _COMPRESSION, file, mtime=0) as packed:
        packed.write(image.to_bytes())
