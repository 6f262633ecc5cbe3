"""Dice and HD95 against hand-computed cases."""

import math

import numpy as np
import pytest

from training.metrics import BRATS_WORST_MM, dice, hd95, mean


def box(*corners, shape=(12, 12, 12)):
    volume = np.zeros(shape, bool)
    for low, high in corners:
        volume[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return volume


def test_dice_of_overlapping_boxes():
    a, b = box(((0, 0, 0), (4, 4, 4))), box(((2, 0, 0), (6, 4, 4)))
    assert dice(a, b) == pytest.approx(2 * 32 / 128)
    assert dice(a, a) == 1


def test_distance_of_two_single_voxels_on_an_anisotropic_grid():
    a, b = box(((1, 1, 1), (2, 2, 2))), box(((1, 4, 5), (2, 5, 6)))
    assert hd95(a, b, (1.0, 1.0, 1.0)) == pytest.approx(5.0)
    assert hd95(a, b, (1.0, 2.0, 3.0)) == pytest.approx(math.hypot(6, 12), rel=1e-5)


def test_distance_of_a_shifted_box_and_at_the_border():
    a, b = box(((0, 2, 2), (4, 8, 8))), box(((3, 2, 2), (7, 8, 8)))
    assert hd95(a, b, (1.5, 1.0, 1.0)) == pytest.approx(4.5)
    assert hd95(a, a, (1.0, 1.0, 1.0)) == 0


NOTHING, SOMETHING = box(), box(((1, 1, 1), (3, 3, 3)))


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


def test_means_leave_out_what_is_undefined():
    assert mean([1.0, math.nan, 0.5]) == 0.75
    assert mean([math.nan]) is None
