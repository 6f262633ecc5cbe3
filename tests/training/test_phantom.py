"""Phantoms: reproducible, anatomically sane, and seen by each contrast as a patient's scans are."""

from __future__ import annotations

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage
from typer.testing import CliRunner

from training.cli import app
from training.errors import UserError
from training.phantom import PhantomSubject, make_subject, write_subject
from training.phantom.anatomy import load_anatomy
from training.phantom.contrast import CONTRASTS
from training.phantom.fields import SmoothField
from training.phantom.pose import Pose
from training.phantom.tumour import grow_tumour

SMALL = (40, 40, 26)
MEDIUM = (80, 80, 52)


@lru_cache
def subject(index: int, shape: tuple[int, int, int] = MEDIUM, spacing: float = 3.0) -> PhantomSubject:
    return make_subject(5, index, shape, spacing)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def cut(brain: np.ndarray) -> bool:
    """Whether the brain runs into a side of the grid, more than by the touch of its outermost voxels."""
    areas = [brain.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    return any(max(a[0], a[-1]) > 0.12 * a.max() for a in areas)


def test_same_seed_gives_the_same_bytes_whatever_the_number_of_workers(tmp_path):
    options = ["--subjects", "3", "--seed", "4", "--spacing", "6", "--shape", "40,40,26"]
    for name, workers in (("a", "1"), ("b", "2")):
        result = CliRunner().invoke(app, ["phantom", str(tmp_path / name), *options, "--workers", workers])
        assert result.exit_code == 0, result.output
    first = digests(tmp_path / "a")
    assert len(first) == 15
    assert first == digests(tmp_path / "b")
    # A patient does not depend on how many others are made.
    write_subject(tmp_path / "c", make_subject(4, 2, SMALL, 6.0))
    assert digests(tmp_path / "c").items() <= first.items()


def test_seeds_and_indices_give_different_patients():
    images = [make_subject(s, i, SMALL, 6.0).images["t1"] for s, i in ((1, 1), (1, 2), (2, 1))]
    assert not any(np.array_equal(a, b) for a, b in ((images[0], images[1]), (images[0], images[2])))


def test_files_are_brats_style(tmp_path):
    made = subject(1)
    folder = write_subject(tmp_path, made)
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        f"Phantom_0001_{what}.nii.gz" for what in ("flair", "t1ce", "t1", "t2", "seg")
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Phantom_0001"]  # nothing half-made is left
    for name in CONTRASTS:
        image = nibabel.load(folder / f"Phantom_0001_{name}.nii.gz")
        assert image.get_data_dtype() == np.uint16
        assert image.shape == MEDIUM
        assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
        assert image.header.get_zooms() == (3.0, 3.0, 3.0)
        assert np.array_equal(np.asarray(image.dataobj), made.images[name])
    labels = nibabel.load(folder / "Phantom_0001_seg.nii.gz")
    assert labels.get_data_dtype() == np.uint8
    assert set(np.unique(labels.dataobj)) <= {0, 1, 2, 4}


def test_full_grid_has_the_affine_of_brats():
    affine = make_subject(1, 1, (240, 240, 40), 1.0).affine
    assert np.array_equal(affine, [[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize("index", range(1, 6))
def test_brain_is_stripped_and_holds_the_tumour(index):
    made = subject(index)
    brain = made.images["t1"] > 0
    for image in made.images.values():
        assert np.array_equal(image > 0, brain)  # every voxel of the brain at least 1, all else exactly 0
    assert 1000 < brain.sum() * 27 / 1000 < 1900  # mL
    assert not made.labels[~brain].any()
    whole = (made.labels > 0).sum() * 27 / 1000
    assert 3 < whole < 200
    assert not cut(brain)


def test_a_share_of_patients_does_not_enhance():
    without = [i for i in range(1, 9) if not (subject(i).labels == 4).any()]
    assert 1 <= len(without) <= 3


def contrast(name: str, ring: str) -> float:
    """How far two neighbouring tissues stand apart in a contrast, in standard deviations; mean over patients."""
    found = []
    for index in range(1, 9):
        made = subject(index)
        image = made.images[name].astype(float)
        healthy = (made.images["t1"] > 0) & (made.labels == 0)
        first = made.labels == (4 if ring == "rim" else 2)
        second = (made.labels == 2) if ring == "rim" else healthy
        if first.sum() > 50:
            a, b = image[first], image[second]
            found.append((a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / 2))
    return float(np.mean(found))


def test_oedema_shows_in_flair_then_t2_and_is_dark_in_t1():
    flair, t2, t1 = contrast("flair", "oedema"), contrast("t2", "oedema"), contrast("t1", "oedema")
    assert flair > 2
    assert 0.5 < t2 < flair
    assert -2 < t1 < -0.3


def test_the_rim_shows_in_t1ce_alone():
    assert contrast("t1ce", "rim") > 2
    for other in ("flair", "t1", "t2"):
        assert abs(contrast(other, "rim")) < 1.5


def test_fluid_is_dark_in_flair_and_bright_in_t2():
    made = subject(2)
    healthy = (made.images["t1"] > 0) & (made.labels == 0)
    t1 = made.images["t1"]
    fluid = healthy & (t1 < np.percentile(t1[healthy], 6))
    for name, bright in (("t2", True), ("flair", False)):
        image = made.images[name]
        assert bool(image[fluid].mean() > image[healthy].mean()) is bright


def test_oedema_follows_white_matter():
    anatomy = load_anatomy(2.0)
    pose = Pose(np.random.default_rng(3))
    low, high = pose.extent(anatomy)
    shares = []
    for seed in range(3):
        tumour = grow_tumour(np.random.default_rng(seed), pose, low, high)
        template = pose.to_template(tumour.axes)
        here = np.stack(np.meshgrid(*tumour.axes, indexing="ij")).reshape(3, -1)
        white = anatomy.tissues(pose.swell(template.reshape(3, -1), here, tumour.swelling))[2]
        reached = (tumour.core > 0) & (tumour.oedema < 0)
        distance = ndimage.distance_transform_edt(tumour.core > 0, sampling=2.0)
        # What lies as near the core as the oedema does, but was not reached.
        spared = (tumour.core > 0) & ~reached & (distance < np.percentile(distance[reached], 90)) & (distance > 3)
        spared &= anatomy.sample(anatomy.brain, template) > 0.5
        shares.append(white[reached.ravel()].mean() - white[spared.ravel()].mean())
    assert min(shares) > 0.15


def test_another_grid_shows_the_same_patient():
    fine, coarse = subject(1), make_subject(5, 1, SMALL, 6.0)
    for label in (1, 2, 4):
        a, b = (fine.labels == label).sum() * 27 / 1000, (coarse.labels == label).sum() * 216 / 1000
        assert abs(a - b) < 0.25 * a + 2
    assert abs((fine.images["t1"] > 0).sum() * 27 / ((coarse.images["t1"] > 0).sum() * 216) - 1) < 0.05


def test_a_small_field_of_view_shrinks_the_patient():
    whole, tight = subject(1), make_subject(5, 1, (32, 32, 32), 3.0)
    brain = tight.images["t1"] > 0
    assert 0 < brain.sum() < 0.5 * (whole.images["t1"] > 0).sum()
    assert (tight.labels > 0).any()
    assert not cut(brain)


def test_fields_are_functions_of_mm():
    field = SmoothField(np.random.default_rng(1), 12.0)
    fine = np.arange(-60, 60, 2, dtype=np.float32)
    values = field.on(fine, fine, fine)
    assert np.array_equal(values[::3, ::3, ::3], field.on(fine[::3], fine[::3], fine[::3]))
    assert abs(values.mean()) < 0.3
    assert 0.7 < values.std() < 1.3


def test_tissues_sum_to_one_inside_the_brain():
    anatomy = load_anatomy(1.0)
    inside = np.argwhere(anatomy.brain > 0.9)[::5000].T + anatomy.origin[:, None]
    fractions = anatomy.tissues(inside.astype(np.float32))
    assert np.allclose(fractions.sum(axis=0), 1, atol=1e-5)
    assert fractions.min() >= 0


def run(*arguments: str) -> UserError:
    result = CliRunner().invoke(app, ["phantom", *arguments])
    assert isinstance(result.exception, UserError), result.output
    return result.exception


def test_existing_patients_are_not_replaced_unasked(tmp_path):
    write_subject(tmp_path, make_subject(1, 1, SMALL, 6.0))
    before = digests(tmp_path)
    options = [str(tmp_path), "--subjects", "1", "--seed", "8", "--spacing", "6", "--shape", "40,40,26"]
    error = run(*options)
    assert "Phantom_0001" in str(error)
    assert "--overwrite" in str(error)
    assert digests(tmp_path) == before
    assert CliRunner().invoke(app, ["phantom", *options, "--overwrite"]).exit_code == 0
    assert digests(tmp_path).keys() == before.keys()
    assert digests(tmp_path) != before


@pytest.mark.parametrize("shape", ["40,40", "a,b,c", "4,40,40", "40,40,4000"])
def test_a_bad_shape_is_explained(tmp_path, shape):
    assert "--shape" in str(run(str(tmp_path), "--shape", shape))
    assert not list(tmp_path.iterdir())


def test_without_nilearn_the_remedy_is_named(tmp_path, monkeypatch):
    load_anatomy.cache_clear()
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "nilearn" else real(n, *a))
    error = run(str(tmp_path / "out"), "--subjects", "1", "--workers", "1")
    assert "pip install 'passion-seg[phantom]'" in str(error)
    assert not (tmp_path / "out").exists()
