"""Dice and HD95 against hand-computed cases."""

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
from monai.metrics import compute_hausdorff_distance
from torch import from_numpy

from training.metrics import BRATS_WORST_MM, dice, hd95, mean, without_small


def box(*corners, shape=(12, 12, 12)):
    volume = np.zeros(shape, bool)
    for low, high in corners:
        volume[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return volume


NOTHING, SOMETHING = box(), box(((1, 1, 1), (3, 3, 3)))
ONE_VOXEL = box(((1, 1, 1), (2, 2, 2)))


def test_dice_of_overlapping_boxes():
    a, b = box(((0, 0, 0), (4, 4, 4))), box(((2, 0, 0), (6, 4, 4)))
    assert dice(a, b) == pytest.approx(2 * 32 / 128)
    assert dice(a, a) == 1


def test_distance_of_two_single_voxels_on_an_anisotropic_grid():
    a, b = box(((1, 1, 1), (2, 2, 2))), box(((1, 4, 5), (2, 5, 6)))
    assert hd95(a, b, (1.0, 1.0, 1.0)) == pytest.approx(5.0)
    assert hd95(a, b, (1.0, 2.0, 3.0)) == pytest.approx(math.hypot(6, 12), rel=1e-5)


@pytest.mark.parametrize("axis", range(3))
def test_distance_along_each_axis_is_in_its_own_mm(axis):
    far = [1, 1, 1]
    far[axis] += 6
    a, b = box(((1, 1, 1), (2, 2, 2))), box((far, [i + 1 for i in far]))
    spacing = (0.5, 1.25, 8.0)
    assert hd95(a, b, spacing) == hd95(b, a, spacing) == pytest.approx(6 * spacing[axis])


def test_distance_of_a_shifted_box_and_at_the_border():
    a, b = box(((0, 2, 2), (4, 8, 8))), box(((3, 2, 2), (7, 8, 8)))
    assert hd95(a, b, (1.5, 1.0, 1.0)) == pytest.approx(4.5)
    assert hd95(a, a, (1.0, 1.0, 1.0)) == 0


def rod(*places):
    """Voxels of a row, which are all surface, so that every distance is a difference of places."""
    volume = np.zeros((1, 1, 200), bool)
    volume[0, 0, list(places)] = True
    return volume


def test_it_is_the_percentile_and_not_the_maximum():
    # 40 voxels found, and one false alarm 100 voxels off: 1 of 41 distances is not 0, fewer than one in twenty.
    truth, prediction = rod(*range(40)), rod(*range(40), 139)
    assert hd95(prediction, truth, (1, 1, 1)) == 0
    # With three of 43 distances at 100 voxels and more, the 95th percentile (place 0.95 * 42 = 39.9, from 0) lies nine
    # tenths of the way from the last 0 to the first of them.
    prediction = rod(*range(40), 139, 140, 141)
    assert hd95(prediction, truth, (1, 1, 2)) == pytest.approx(2 * 0.9 * 100, rel=1e-5)


def test_each_direction_has_its_own_percentile_and_the_larger_counts():
    # Found only the first 2 of 40: from the prediction all distances are 0, from the truth 0, 0, 1, 2, ... 38.
    truth, prediction = rod(*range(40)), rod(0, 1)
    want = 0.95 * 39 - 1
    assert hd95(prediction, truth, (1, 1, 1)) == pytest.approx(want, rel=1e-5)
    assert hd95(truth, prediction, (1, 1, 1)) == pytest.approx(want, rel=1e-5)
    # One percentile of both directions together, which others use, would be less.
    assert np.percentile([0, 0, 0, 0, *range(1, 39)], 95) == pytest.approx(want - 0.1)


def test_only_surfaces_count():
    # A solid cube and its shell, one voxel thick, have the same surface: what is inside the cube counts for nothing.
    solid = box(((2, 2, 2), (9, 9, 9)))
    shell = solid & ~box(((3, 3, 3), (8, 8, 8)))
    assert hd95(solid, shell, (1, 1, 1)) == 0


def blobs(seed):
    """Two ragged regions somewhere in a volume."""
    rng = np.random.default_rng(seed)
    inside = np.s_[3 : 7 + seed, 5:17, 2:9]
    pair = np.zeros((2, 20, 24, 18), bool)
    for region in pair:
        region[inside] = rng.random(region[inside].shape) < 0.3
    return pair


@pytest.mark.parametrize("seed", range(5))
def test_the_box_changes_nothing_and_monai_agrees(seed):
    a, b = blobs(seed)
    spacing = (1.0, 0.7, 3.0)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        pair = (from_numpy(r)[None, None] for r in (a, b))
        whole = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing)
    assert hd95(a, b, spacing) == pytest.approx(whole.item(), rel=1e-6)
    against_the_edges = [np.roll(r, (-3, -5, -2), (0, 1, 2)) for r in (a, b)]
    in_the_middle = [np.pad(r, 10) for r in (a, b)]
    assert hd95(*against_the_edges, spacing) == hd95(*in_the_middle, spacing) == hd95(a, b, spacing)


def test_importing_it_imports_no_monai():
    """Every command that trains or scores would wait seconds for it."""
    code = "import sys, training.metrics, training.experiments.data; print('monai' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_no_warning_reaches_the_user():
    with warnings.catch_warnings(action="error"):
        hd95(SOMETHING, ONE_VOXEL, (1, 1, 1))


def first(count):
    """That many voxels of 1000."""
    volume = np.zeros((10, 10, 10), bool)
    volume.flat[:count] = True
    return volume


@pytest.mark.parametrize(
    ("count", "voxel_mm", "kept"),
    [(499, 1.0, False), (500, 1.0, True), (62, 2.0, False), (63, 2.0, True), (7, 4.0, False), (8, 4.0, True)],
)
def test_half_a_millilitre_is_the_same_on_every_grid(count, voxel_mm, kept):
    left = without_small(first(count), 0.5, voxel_mm**3 / 1000)
    assert left.sum() == (count if kept else 0)


def test_an_affine_in_single_precision_loses_no_voxel():
    edge = float(np.nextafter(np.float32(1), np.float32(0)))
    assert without_small(first(500), 0.5, edge**3 / 1000).sum() == 500


def test_all_of_a_region_counts_together_wherever_it_lies():
    apart = box(((0, 0, 0), (5, 10, 5)), ((6, 0, 6), (11, 10, 11)))
    assert without_small(apart, 0.5, 0.001) is apart
    assert not without_small(apart & ~box(((0, 0, 0), (1, 1, 1))), 0.5, 0.001).any()


@pytest.mark.parametrize(
    ("prediction", "truth", "convention", "want_dice", "want_hd95"),
    [
        (NOTHING, NOTHING, "published", 1, 0),
        (SOMETHING, NOTHING, "published", 0, math.nan),
        (NOTHING, SOMETHING, "published", 0, math.nan),
        (NOTHING, NOTHING, "brats", 1, 0),
        (SOMETHING, NOTHING, "brats", 0, BRATS_WORST_MM),
        (NOTHING, SOMETHING, "brats", 0, BRATS_WORST_MM),
        (NOTHING, NOTHING, "nan", math.nan, math.nan),
        (SOMETHING, NOTHING, "nan", math.nan, math.nan),
        (NOTHING, SOMETHING, "nan", 0, math.nan),
    ],
)
def test_empty_regions(prediction, truth, convention, want_dice, want_hd95):
    assert dice(prediction, truth, convention) == pytest.approx(want_dice, nan_ok=True)
    assert hd95(prediction, truth, (1, 1, 1), convention) == pytest.approx(want_hd95, nan_ok=True)


def test_identical_regions_are_perfect():
    for region in (SOMETHING, ONE_VOXEL, blobs(1)[0]):
        assert dice(region, region) == 1
        assert hd95(region, region, (1, 2, 3)) == 0


def test_single_voxels():
    assert dice(ONE_VOXEL, box(((2, 1, 1), (3, 2, 2)))) == 0
    assert dice(ONE_VOXEL, SOMETHING) == pytest.approx(2 * 1 / 9)


def test_means_leave_out_what_is_undefined():
    assert mean([1.0, math.nan, 0.5]) == 0.75
    assert mean([math.nan]) is None
