"""`Registration`: where one scan of a head lies in the world of another, found by SimpleITK, and judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from models.raw.coarse import Bool, Coarse
from models.raw.itk import alone
from models.raw.similarity import similarity, turn_about
from models.volume import Affine, Volume, VolumeError

FINE_MM, COARSE_MM = 2.0, 4.0
"""Voxels that are registered, and voxels on which starts are compared and results judged."""
BINS = 32
SEED = 20
ITERATIONS = 60
"""Per level."""
RADIUS_MM = 50.0
"""A turn counts as much as a shift of what lies this far from the middle of the head."""
SAMPLES = 20_000
"""Voxels that count, per level of 8, 4 and 2 mm."""
MOST_MM, MOST_DEGREES = 60.0, 45.0
LEAST_SIMILARITY = 0.1
LEAST_OVERLAP = 0.8
"""Dice of the two heads, where both scans see."""
OTHER_DEGREES, OTHER_MM = (5.0, -5.0, 5.0), (4.0, 4.0, -4.0)
"""How the second start differs from all others."""
AGREE_MM = 2.5
"""How far apart two starts may end, at the corner of the head that differs most."""


@dataclass(frozen=True)
class Registration:
    """A rigid motion and what speaks for it."""

    matrix: Affine
    """(4, 4): mm of the fixed scan's world to mm of the moving one's."""
    similarity: float
    """0..1, see `similarity`."""
    before: float
    """The same where the headers have the two."""
    overlap: float
    """Dice of the heads."""
    shift_mm: float
    """Of the middle of the head, from where the headers have it."""
    degrees: float
    apart_mm: float
    """Between the ends of two starts."""
    settled: bool
    """Whether the optimiser came to rest."""

    def placed(self, volume_affine: Affine) -> Affine:
        """The moving scan's affine in the fixed scan's world."""
        placed: Affine = np.linalg.inv(self.matrix) @ volume_affine
        return placed


def register(fixed: Volume, moving: Volume, name: str, reference: str) -> Registration:
    """Where `moving` (called `name`) lies in the world of `fixed` (called `reference`).

    Deterministic: one thread, one seed. Raises `VolumeError` where the result cannot be trusted.
    """
    with alone():
        result = _registered(fixed, moving, name, reference)
    _refuse(result, name, reference)
    return result


def _registered(fixed: Volume, moving: Volume, name: str, reference: str) -> Registration:
    fine = Coarse.of(fixed, FINE_MM), Coarse.of(moving, FINE_MM)
    rough = Coarse.of(fixed, COARSE_MM), Coarse.of(moving, COARSE_MM)
    heads = rough[0].bright(), rough[1].bright()
    for which, head in ((reference, heads[0]), (name, heads[1])):
        if not head.any():
            raise VolumeError(f"{which}: shows no head; leave it out")
    first, *others = sorted(_starts(rough, heads), key=lambda start: -similarity(*rough, start))
    found, settled = _optimise(*fine, first, levels=3)
    elsewhere = turn_about(rough[0].centre(heads[0]), np.array(OTHER_DEGREES), np.array(OTHER_MM))
    second, _ = _optimise(*rough, others[0] @ elsewhere, levels=2)
    if similarity(*rough, second) > similarity(*rough, found) + 0.01:  # the first start led astray
        second, (found, settled) = found, _optimise(*fine, second, levels=3)
    return _judged(rough, heads, found, second, settled)


def _starts(images: tuple[Coarse, Coarse], heads: tuple[Bool, Bool]) -> list[Affine]:
    """As the headers have it; the middles of the heads on each other; the middles of the boxes on each other."""
    fixed, moving = images
    starts = [np.eye(4)]
    for one, two in (
        (fixed.centre(heads[0]), moving.centre(heads[1])),
        (fixed.corners(heads[0]).mean(0), moving.corners(heads[1]).mean(0)),
    ):
        start = np.eye(4)
        start[:3, 3] = two - one
        starts.append(start)
    return starts


def _optimise(fixed: Coarse, moving: Coarse, start: Affine, levels: int) -> tuple[Affine, bool]:
    """Gradient steps on Mattes' mutual information from coarse to fine. The matrix, and whether they came to rest."""
    import SimpleITK as sitk  # noqa: N813 - its documentation calls it so

    transform = sitk.Euler3DTransform()
    centre = fixed.centre(fixed.bright())
    transform.SetCenter(centre.tolist())
    transform.SetMatrix(start[:3, :3].ravel().tolist())
    transform.SetTranslation((start[:3, :3] @ centre + start[:3, 3] - centre).tolist())
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    shrinks = [2**n for n in reversed(range(levels))]
    voxels = [fixed.data.size / shrink**3 for shrink in shrinks]
    method.SetMetricSamplingPercentagePerLevel([min(1.0, SAMPLES / n) for n in voxels], SEED)
    # Central differences at the samples, instead of a filter over all voxels first.
    method.SetMetricUseFixedImageGradientFilter(False)
    method.SetMetricUseMovingImageGradientFilter(False)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0, minStep=0.005, numberOfIterations=ITERATIONS, relaxationFactor=0.6
    )
    method.SetOptimizerScales([RADIUS_MM**2] * 3 + [1.0] * 3)
    method.SetShrinkFactorsPerLevel(shrinks)
    method.SetSmoothingSigmasPerLevel([float(n) for n in reversed(range(levels))])
    method.SetSmoothingSigmasAreSpecifiedInPhysicalUnits(False)
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(_image(fixed), _image(moving))
    except RuntimeError:  # ITK's way to say that the two do not overlap
        return start, False
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(transform.GetMatrix(), (3, 3))
    middle, shift = np.array(transform.GetCenter()), np.array(transform.GetTranslation())
    matrix[:3, 3] = shift + middle - matrix[:3, :3] @ middle
    return matrix, "aximum number of iterations" not in method.GetOptimizerStopConditionDescription()


def _image(coarse: Coarse) -> Any:
    """As SimpleITK has images; its world is ours, R, A, S, as it need not know of patients."""
    import SimpleITK as sitk  # noqa: N813 - its documentation calls it so

    low, high = np.quantile(coarse.data, (0.001, 0.999))
    image = sitk.GetImageFromArray(np.ascontiguousarray(np.clip(coarse.data, low, high).T))
    zooms = np.array(coarse.zooms)
    image.SetSpacing(zooms.tolist())
    image.SetDirection((coarse.affine[:3, :3] / zooms).ravel().tolist())
    image.SetOrigin(coarse.affine[:3, 3].tolist())
    return image


def _judged(
    images: tuple[Coarse, Coarse], heads: tuple[Bool, Bool], found: Affine, second: Affine, settled: bool
) -> Registration:
    fixed, moving = images
    centre, corners = fixed.centre(heads[0]), fixed.corners(heads[0])
    seen, there = fixed.seen_from(Coarse(heads[1].astype(np.float32), moving.affine), found)
    one, two = heads[0] & there, (seen > 0.5) & there
    ends = [corners @ m[:3, :3].T + m[:3, 3] for m in (found, second)]
    return Registration(
        matrix=found,
        similarity=similarity(fixed, moving, found),
        before=similarity(fixed, moving, np.eye(4)),
        overlap=2 * float((one & two).sum()) / max(float(one.sum() + two.sum()), 1.0),
        shift_mm=float(np.linalg.norm(found[:3, :3] @ centre + found[:3, 3] - centre)),
        degrees=float(np.degrees(np.arccos(np.clip((np.trace(found[:3, :3]) - 1) / 2, -1, 1)))),
        apart_mm=float(np.linalg.norm(ends[0] - ends[1], axis=1).max()),
        settled=settled,
    )


def _refuse(result: Registration, name: str, reference: str) -> None:
    """Raises `VolumeError` for what speaks against a result."""
    if result.similarity < LEAST_SIMILARITY or result.similarity < result.before - 0.01:
        why = f"no position makes the two alike (similarity {result.similarity:.2f})"
    elif result.overlap < LEAST_OVERLAP:
        why = f"the heads do not cover each other (Dice {result.overlap:.2f})"
    elif result.shift_mm > MOST_MM or result.degrees > MOST_DEGREES:
        why = f"it would have to move by {result.shift_mm:.0f} mm and {result.degrees:.0f} degrees"
    elif result.apart_mm > AGREE_MM:
        why = f"two starts end {result.apart_mm:.0f} mm apart"
    elif not result.settled:
        why = "the search did not come to rest"
    else:
        return
    raise VolumeError(
        f"{name}: could not be registered to {reference}: {why}. Is it a scan of the same patient's head? Register it "
        "yourself and use preprocess none, or leave it out"
    )
