"""Crops and their augmentation."""

import numpy as np
from scipy.ndimage import rotate

from training.augment import OUTSIDE, PLANES, augment, crop_start


def test_crops_stay_inside_and_reach_every_place():
    rng = np.random.default_rng(0)
    starts = {crop_start((20, 16, 17), (16, 16, 16), rng) for _ in range(200)}
    assert {s[0] for s in starts} == set(range(5))
    assert {s[1] for s in starts} == {0}
    assert {s[2] for s in starts} == {0, 1}


def test_a_centred_crop_holds_its_centre():
    for centre in ([0, 0, 0], [10, 19, 5], [19, 19, 19]):
        start = crop_start((20, 20, 20), (8, 8, 8), np.random.default_rng(0), tuple(centre))
        assert all(s <= c < s + 8 and 0 <= s <= 12 for s, c in zip(start, centre, strict=True))


def test_images_and_labels_move_together():
    labels = np.zeros((24, 24, 24), np.uint8)
    labels[4:14, 6:18, 9:20] = 1
    labels[6:9, 8:12, 11:15] = 3
    images = np.stack([labels.astype(np.float32) * 10, labels.astype(np.float32) * 10 + 100])
    for seed in range(20):
        out, moved = augment(images, labels, np.random.default_rng(seed))
        inside = out[1] > 50  # what a rotation brought in from outside is near -1
        recovered = (out[0] / (out[0][moved == 3].mean() / 30)).round(-1) / 10
        assert (recovered[inside] == moved[inside]).mean() > 0.98
        assert out.shape == images.shape
        assert not moved[~inside].any()


def test_intensities_change_within_the_published_range():
    ones = np.ones((2, 8, 8, 8), np.float32)
    seen = []
    for seed in range(200):
        out, _ = augment(ones, np.zeros((8, 8, 8), np.uint8), np.random.default_rng(seed))
        seen += [out[c, 4, 4, 4] for c in range(2)]
    assert 0.8 <= min(seen) < 0.85
    assert 1.15 < max(seen) <= 1.2
    assert OUTSIDE == -1


def test_voxels_move_as_scipys_rotation_and_numpys_flips_move_them():
    """The same draws, written plainly: channel by channel, one operation after the other."""
    noise = np.random.default_rng(0)
    images = noise.normal(size=(3, 20, 17, 24)).astype(np.float32)
    labels = noise.integers(0, 4, (20, 17, 24)).astype(np.uint8)
    angles, planes = set(), set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        plane = PLANES[rng.integers(3)]
        angle = int(rng.integers(-10, 10))
        wanted = np.stack([rotate(i, angle, axes=plane, reshape=False, order=0, cval=-1.0) for i in images])
        wanted_labels = rotate(labels, angle, axes=plane, reshape=False, order=0, cval=0)
        scale, shift = (
            rng.uniform(low, high, (3, 1, 1, 1)).astype(np.float32) for low, high in ((0.9, 1.1), (-0.1, 0.1))
        )
        wanted = wanted * scale + shift
        for axis in range(3):
            if rng.random() < 0.5:
                wanted, wanted_labels = np.flip(wanted, axis + 1), np.flip(wanted_labels, axis)
        given = images.copy(), labels.copy()
        moved, moved_labels = augment(*given, np.random.default_rng(seed))
        assert np.array_equal(moved, wanted)
        assert np.array_equal(moved_labels, wanted_labels)
        assert (moved.dtype, moved_labels.dtype) == (np.float32, np.uint8)
        assert np.array_equal(given[0], images)
        angles.add(angle)
        planes.add(plane)
    assert (len(angles), len(planes)) == (20, 3)
