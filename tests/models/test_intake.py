"""The input contract: what goes in comes back where it was."""

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.affines import from_matvec, voxel_sizes
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from models.intake import brain_box, normalise, statistics, take_in
from models.task import Task
from models.volume import Grid, Volume, VolumeError

GLIOMA = Task.load("glioma")


def small_task(spacing=(1.0, 1.0, 1.0), patch=8, min_crop=12):
    changes = {"patch_size": (patch,) * 3, "spacing": spacing, "min_crop": min_crop}
    return Task.model_validate(GLIOMA.model_dump() | changes)


def rotation(angles):
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        c, s = np.cos(angle), np.sin(angle)
        turn = np.eye(3)
        i, j = [a for a in range(3) if a != axis]
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
        matrix = matrix @ turn
    return matrix


def make_volume(data, affine, sform=1, qform=1):
    image = nib.Nifti1Image(data.astype(np.float32), affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    return Volume(data.astype(np.float32), Grid.of(image))


ORIENTATIONS = ["".join(p) for p in ("LPS", "RAS", "PIR", "ASL", "SRP", "IPL", "LAI", "RSP")]


@st.composite
def scans(draw):
    """A blob in a volume of any orientation, tilt and odd shape."""
    shape = tuple(draw(st.integers(6, 20)) for _ in range(3))
    codes = draw(st.sampled_from(ORIENTATIONS))
    tilt = rotation([draw(st.floats(-0.3, 0.3)) for _ in range(3)])
    origin = [draw(st.floats(-100, 100)) for _ in range(3)]
    base = from_matvec(tilt, origin)
    transform = ornt_transform(axcodes2ornt(codes), axcodes2ornt("RAS"))
    affine = base @ inv_ornt_aff(transform, shape)
    low = [draw(st.integers(0, n - 3)) for n in shape]
    high = [draw(st.integers(a + 2, n)) for a, n in zip(low, shape, strict=True)]
    seed = draw(st.integers(0, 2**16))
    data = np.zeros(shape, np.float32)
    blob = np.random.default_rng(seed).uniform(1, 9, [b - a for a, b in zip(low, high, strict=True)])
    data[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = blob
    return data, affine


@settings(deadline=None, max_examples=150)
@given(scans())
def test_round_trip_at_the_tasks_spacing_is_exact(scan):
    data, affine = scan
    intake = take_in({"t1": make_volume(data, affine)}, small_task())
    array = intake.arrays["t1"]
    assert all(n >= 8 for n in array.shape)
    classes = np.minimum(array, 3).astype(np.uint8)
    back = intake.restore_classes(classes)
    np.testing.assert_array_equal(back, np.minimum(data, 3).astype(np.uint8))
    onehot = (classes[None] == np.arange(4)[:, None, None, None]).astype(np.float32)
    np.testing.assert_array_equal(intake.restore(onehot), back)
    np.testing.assert_array_equal(intake.without_images().restore_region(onehot, (1, 3)), np.isin(back, (1, 3)))


@settings(deadline=None, max_examples=60)
@given(scans(), st.sampled_from([(1.5, 1.5, 1.5), (2.0, 1.0, 1.0), (0.8, 0.8, 1.7)]))
def test_round_trip_with_resampling_keeps_the_place(scan, spacing):
    data, affine = scan
    # A solid ball, so that its centre and volume can be compared.
    shape = np.array(data.shape) * 2
    index = np.indices(shape).transpose(1, 2, 3, 0)
    ball = (np.linalg.norm(index - (shape - 1) / 2, axis=-1) < 5).astype(np.float32) * 7
    intake = take_in({"t1": make_volume(ball, affine)}, small_task(spacing))
    assert intake.working.resampled
    np.testing.assert_allclose(voxel_sizes(intake.working.affine), spacing)
    inside = np.clip(intake.arrays["t1"] / 7, 0, 1)
    probabilities = np.stack([1 - inside, inside, 0 * inside, 0 * inside])
    back = intake.restore(probabilities)
    assert back.shape == ball.shape
    assert np.abs(np.argwhere(back == 1).mean(0) - np.argwhere(ball > 0).mean(0)).max() < 0.3
    assert (back == 1).sum() == pytest.approx((ball > 0).sum(), rel=0.12)
    region = intake.restore_region(probabilities, (1, 3))
    sure = np.abs(region - 0.5) > 1e-5  # where rounding does not decide
    np.testing.assert_array_equal((region > 0.5)[sure], (back == 1)[sure])
    assert 0 <= region.min() <= region.max() <= 1


def test_all_modalities_land_on_the_first_ones_grid():
    rng = np.random.default_rng(0)
    data = np.zeros((20, 24, 16), np.float32)
    data[4:15, 5:18, 3:12] = rng.uniform(1, 2, (11, 13, 9))
    affine = from_matvec(np.diag([-1.0, -1, 1]), [10, 20, -5])
    flipped = data[::-1, :, ::-1]
    other = affine @ from_matvec(np.diag([-1.0, 1, -1]), [19, 0, 15])
    intake = take_in({"t2": make_volume(data, affine), "t1": make_volume(flipped, other)}, small_task())
    np.testing.assert_allclose(intake.arrays["t1"], intake.arrays["t2"], atol=1e-5)


def test_scans_of_different_places_are_refused():
    data = np.zeros((16, 16, 16), np.float32)
    data[4:9, 4:9, 4:9] = 1 + np.arange(125).reshape(5, 5, 5)
    far = from_matvec(np.eye(3), [500, 0, 0])
    with pytest.raises(VolumeError, match="t1: does not lie where flair lies"):
        take_in({"flair": make_volume(data, np.eye(4)), "t1": make_volume(data, far)}, small_task())


def test_a_field_of_view_beyond_reason_is_refused():
    data = np.zeros((64, 64, 64), np.float32)
    data[30:40, 30:40, 30:40] = 1 + np.arange(1000).reshape(10, 10, 10)
    with pytest.raises(VolumeError, match="spans 1280 x 1280 x 1280 mm"):
        take_in({"t1": make_volume(data, np.diag([20.0, 20, 20, 1]))}, small_task())


def test_an_empty_or_flat_scan_is_refused():
    data = np.zeros((16, 16, 16), np.float32)
    with pytest.raises(VolumeError, match="flair: every voxel is 0"):
        take_in({"flair": make_volume(data, np.eye(4))}, small_task())
    data[4:9, 4:9, 4:9] = 3
    with pytest.raises(VolumeError, match="no contrast"):
        normalise(take_in({"flair": make_volume(data, np.eye(4))}, small_task()).arrays)


def test_the_box_keeps_the_minimum_where_the_volume_has_it():
    data = np.zeros((200, 100, 150), np.float32)
    data[0:40, 50:70, 140:150] = 1
    box = brain_box({"t1": data}, GLIOMA)
    assert box.shape == (128, 100, 128)
    assert box.start == (0, 0, 22)
    assert box.stop == (128, 100, 150)
    tiny = brain_box({"t1": data[:, :60, :]}, GLIOMA)
    assert tiny.shape == (128, 80, 128)  # a window must fit, so the box reaches outside the volume
    assert tiny.cut(data[:, :60, :]).shape == (128, 80, 128)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6),
    st.sampled_from([10.0, 12.0, 13.99, 14.0, 14.4, 18.0, 22.0]),
    st.tuples(*[st.floats(-0.5, 0.5)] * 3),
    st.integers(0, 2**16),
)
def test_thick_slices_come_back_as_they_were(slices, thickness, tilt, seed):
    """The first and the last slice too: a voxel fills its extent, and rounding must not cut what is at its end."""
    affine = from_matvec(rotation(tilt) @ np.diag([1.0, 1.0, thickness]), [7, -31, 50])
    data = np.random.default_rng(seed).integers(1, 4, (10, 12, slices)).astype(np.float32)
    task = Task.model_validate(small_task((1.0, 1.0, 2.0)).model_dump() | {"orientation": "stored"})
    volume = make_volume(data, affine)
    intake = take_in({"t1": volume}, task)
    assert intake.working.shape[2] >= slices * thickness / 2 - 1e-6
    classes = intake.working.bring_classes(data.astype(np.uint8), volume.grid, 4)
    onehot = (intake.box.cut(classes)[None] == np.arange(4)[:, None, None, None]).astype(np.float32)
    np.testing.assert_array_equal(intake.restore(onehot), data)


def test_stored_axes_are_left_as_they_are():
    """However a short-axis stack lies in the body, its slices stay on the third axis."""
    task = Task.model_validate(small_task((1.0, 1.0, 8.0)).model_dump() | {"orientation": "stored"})
    data = np.random.default_rng(0).uniform(1, 9, (20, 14, 5)).astype(np.float32)
    for angles in ((0, 0, 0), (0, 1.2, 0), (1.2, 0.3, 0), (3.1, 0, 1.5)):
        volume = make_volume(data, from_matvec(rotation(angles) @ np.diag([1.0, 1.0, 8.0])))
        intake = take_in({"t1": volume}, task)
        np.testing.assert_array_equal(intake.working.bring(volume), data)
        classes = np.minimum(intake.arrays["t1"], 3).astype(np.uint8)
        np.testing.assert_array_equal(intake.restore_classes(classes), np.minimum(data, 3).astype(np.uint8))


def test_a_volume_is_zero_outside_its_field_of_view():
    whole = make_volume(np.full((12, 12, 12), 5, np.float32), np.eye(4))
    part = make_volume(np.full((4, 12, 12), 7, np.float32), from_matvec(np.eye(3), [3.25, 0, 0]))
    task = Task.model_validate(small_task().model_dump() | {"orientation": "RAS"})
    brought = take_in({"t1": whole, "t2": part}, task).working.bring(part)
    # Its faces are at 2.75 and 6.75: the voxels centred on 3, 4, 5 and 6 lie inside.
    np.testing.assert_allclose(brought[:, 5, 5], [0] * 3 + [7] * 4 + [0] * 5)


def test_normalisation_is_over_the_brain_only():
    a = np.zeros((8, 8, 8), np.float32)
    a[2:6] = np.random.default_rng(1).uniform(10, 20, (4, 8, 8))
    b = np.where(a > 0, 5 - a / 10, 0).astype(np.float32)
    brain = a > 0
    out = normalise({"flair": a, "t1": b})
    for array in out.values():
        assert abs(array[brain].mean()) < 1e-5
        assert array[brain].std() == pytest.approx(1, abs=1e-5)
    assert statistics({"flair": a})["flair"][0] == pytest.approx(a[brain].mean(), rel=1e-6)


@pytest.mark.parametrize(("sform", "qform"), [(1, 1), (2, 0), (0, 1), (0, 0), (4, 2)])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_mask_has_the_scans_own_geometry(tmp_path, sform, qform, kind):
    affine = from_matvec(rotation([0.2, -0.1, 0.3]) @ np.diag([1.0, 1.0, 3.0]), [3, -40, 12])
    data = np.random.default_rng(0).integers(1, 9, (10, 12, 7)).astype(np.int16)
    image = kind(data, affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    image.header["descrip"] = b"John Doe 1970"
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / "scan.nii.gz")
    scan = nib.load(tmp_path / "scan.nii.gz")

    grid = Volume.load(tmp_path / "scan.nii.gz").grid
    mask = grid.image(np.zeros(data.shape, np.uint8))
    nib.save(mask, tmp_path / "mask.nii.gz")
    mask = nib.load(tmp_path / "mask.nii.gz")
    assert mask.shape == scan.shape
    np.testing.assert_array_equal(mask.affine, scan.affine)
    assert mask.get_data_dtype() == np.uint8
    for name in ("sform_code", "qform_code", "xyzt_units"):
        assert mask.header[name] == scan.header[name]
    np.testing.assert_array_equal(mask.header.get_zooms(), scan.header.get_zooms())
    np.testing.assert_array_equal(mask.get_qform(), scan.get_qform())
    assert b"John" not in (tmp_path / "mask.nii.gz").read_bytes()
    assert mask.header["descrip"] == b""
