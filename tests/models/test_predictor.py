"""The predictor: windows, subsets, and that an absent modality cannot matter."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
import torch

from models.checkpoint import Checkpoint
from models.intake import largest, take_in
from models.layout import in_fast_layout
from models.predictor import FAST_OVERLAP, OptionError, Predictor
from models.task import Task, TaskError
from models.volume import Volume, VolumeError
from models.windows import Windows


@pytest.fixture(scope="module")
def predictor(small_checkpoint):
    return Predictor(Checkpoint.load(small_checkpoint))


@pytest.fixture(scope="module")
def scans(small_phantoms):
    case = min(small_phantoms.iterdir())
    return {m: case / f"{case.name}_{m}.nii.gz" for m in ("flair", "t1ce", "t1", "t2")}


def test_probabilities_are_the_uniform_mean_over_windows(predictor, scans):
    intake = take_in({m: Volume.load(p) for m, p in scans.items()}, predictor.task)
    from models.intake import normalise

    x = torch.from_numpy(np.stack([normalise(intake.arrays)[m] for m in predictor.task.names]))[None]
    network, size = predictor._network, 16
    total, count = torch.zeros(4, *intake.box.shape), torch.zeros(intake.box.shape)
    starts = [sorted({*range(0, n - size, size // 2), n - size}) for n in intake.box.shape]
    windows = 0
    with torch.inference_mode():
        for a in starts[0]:
            for b in starts[1]:
                for c in starts[2]:
                    place = (slice(a, a + size), slice(b, b + size), slice(c, c + size))
                    mask = (True,) * 4
                    patch = in_fast_layout(x[(slice(None), slice(None), *place)])
                    total[(slice(None), *place)] += network.fuse(network.encode(patch, mask), mask).logits.softmax(1)[0]
                    count[place] += 1
                    windows += 1
    assert windows == len(Windows(intake.box.shape, (16, 16, 16), 0.5))
    np.testing.assert_allclose(predictor.probabilities(intake), (total / count).numpy(), atol=2e-6)


def test_the_voxels_of_an_absent_modality_are_never_read(predictor):
    network = predictor._network
    x = torch.randn(1, 4, 16, 16, 16)
    mask = (True, False, False, True)
    noise = x.clone()
    noise[:, 1] = float("nan")
    noise[:, 2] *= 1000
    with torch.inference_mode():
        a, b = (network.fuse(network.encode(v, mask), mask).logits for v in (x, noise))
    assert torch.equal(a, b)


def test_absent_and_zero_filled_are_the_same_network(predictor):
    """Leaving a modality out equals what the method defines: its input and features zeroed."""
    network = predictor._network
    x = torch.randn(1, 4, 16, 16, 16)
    everything, some = (True,) * 4, (False, True, True, False)
    with torch.inference_mode():
        features = network.encode(x, everything)
        zeroed = [
            [f if there else torch.zeros_like(f) for f, there in zip(level, some, strict=True)] for level in features
        ]
        want = network.fuse(zeroed, everything).logits
        got = network.fuse(network.encode(x, some), some).logits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_order_changes_the_grid_but_not_the_network_input(predictor, scans):
    forth = predictor.segment({"flair": scans["flair"], "t1": scans["t1"]})
    back = predictor.segment({"t1": scans["t1"], "flair": scans["flair"]})
    np.testing.assert_array_equal(forth.classes, back.classes)


def test_aliases_are_accepted_and_doubles_refused(predictor, scans):
    by_alias = predictor.segment({"t2f": scans["flair"]})
    np.testing.assert_array_equal(by_alias.classes, predictor.segment({"flair": scans["flair"]}).classes)
    with pytest.raises(TaskError, match="given twice"):
        predictor.segment({"t2f": scans["flair"], "flair": scans["flair"]})
    with pytest.raises(TaskError, match="at least one of"):
        predictor.segment({})


def test_progress_ends_at_one_and_may_stop_the_work(predictor, scans):
    seen = []
    predictor.segment({"t1": scans["t1"]}, lambda stage, fraction: seen.append((stage, fraction)))
    assert list(dict.fromkeys(s for s, _ in seen)) == ["loading", "normalising", "segmenting", "restoring"]
    assert max(f for s, f in seen if s == "segmenting") == 1

    class StopError(Exception):
        pass

    def stop(stage, fraction):
        if stage == "segmenting" and fraction > 0:
            raise StopError

    with pytest.raises(StopError):
        predictor.segment({"t1": scans["t1"]}, stop)


def test_the_mask_file_says_what_its_values_mean(predictor, scans, tmp_path):
    result = predictor.segment({"t1": scans["t1"]})
    result.save(tmp_path / "mask.nii.gz")
    image = nib.load(tmp_path / "mask.nii.gz")
    assert image.get_data_dtype() == np.uint8
    assert image.header.get_intent()[0] == "label"
    assert b"2 oedema" in image.header["descrip"].tobytes()
    assert b"enhancing tumour" in image.header.extensions[0].get_content()
    values = np.asarray(image.dataobj)
    assert set(np.unique(values)) <= {0, 1, 2, 4}
    voxel = np.prod(image.header.get_zooms()) / 1000
    assert result.volumes_ml["WT"] == pytest.approx((values > 0).sum() * voxel, rel=1e-6)
    assert result.volumes_ml["ET"] == pytest.approx((values == 4).sum() * voxel, rel=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["mask.nii.gz"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.nii.gz", b"", "t1: not a readable NIfTI"),
        ("a.nii", b"hello" * 200, "t1: not a readable NIfTI"),
        ("none.nii", None, "does not exist"),
    ],
)
def test_files_that_are_no_scans_are_refused(predictor, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(VolumeError, match=message):
        predictor.segment({"t1": tmp_path / name})


def test_images_that_are_no_plain_volume_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    good = rng.uniform(1, 2, (8, 8, 8)).astype(np.float32)
    bad = good.copy()
    bad[0, 0, 0] = np.nan
    rgb = np.zeros((4, 4, 4), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    singular = np.diag([1.0, 0, 1, 1])
    for data, affine, message in (
        (bad, np.eye(4), "NaN or infinite"),
        (np.stack([good, good], -1), np.eye(4), "one 3-D volume"),
        (rgb, np.eye(4), "grey-value"),
        (good.astype(np.complex64), np.eye(4), "grey-value"),
        (good, singular, "not invertible"),
    ):
        image = nib.Nifti1Image(data, np.eye(4))
        image.set_sform(affine, 1)
        nib.save(image, tmp_path / "scan.nii")
        with pytest.raises(VolumeError, match=message):
            Volume.load(tmp_path / "scan.nii")
    nib.save(nib.Nifti1Image(good[..., None], np.eye(4)), tmp_path / "scan.nii")
    assert Volume.load(tmp_path / "scan.nii").data.shape == (8, 8, 8)
    blob = (tmp_path / "scan.nii").read_bytes()
    (tmp_path / "scan.nii").write_bytes(blob[:-100])
    with pytest.raises(VolumeError, match="incomplete or damaged"):
        Volume.load(tmp_path / "scan.nii")


def test_several_windows_at_a_time_change_nothing(predictor, small_checkpoint, scans):
    volumes = {m: Volume.load(scans[m]) for m in ("t1", "t2")}
    intake = take_in(volumes, predictor.task)
    three = Predictor(Checkpoint.load(small_checkpoint), batch=3)
    np.testing.assert_allclose(three.probabilities(intake), predictor.probabilities(intake), atol=1e-5)


def test_a_smaller_overlap_and_another_window_cover_the_box(small_checkpoint, scans):
    for options in ({"overlap": FAST_OVERLAP}, {"overlap": 0}, {"window": (24, 16, 48)}):
        predictor = Predictor(Checkpoint.load(small_checkpoint), **options)
        intake = take_in({"t1": Volume.load(scans["t1"])}, predictor.task, predictor.window)
        probabilities = predictor.probabilities(intake)
        np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)
        assert predictor.segment({"t1": scans["t1"]}).classes.shape == (40, 40, 26)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 1.0}, "an overlap of 1 cannot be had: give a share from 0 to 0.9"),
        ({"overlap": -0.1}, "cannot be had"),
        ({"window": (20, 16, 16)}, "20 x 16 x 16 voxels does not fit rfnet: use multiples of 8, at least 16"),
        ({"window": (16, 16)}, "give one number, or three"),
        ({"precision": "float16"}, "precision 'float16' is unknown: use float32 or bfloat16"),
        (
            {"precision": "bfloat16", "device": "meta"},
            "the device 'meta' has no bfloat16 arithmetic: use precision float32",
        ),
    ],
)
def test_options_that_cannot_be_had_are_refused_at_the_start(small_checkpoint, options, message):
    with pytest.raises(OptionError, match=message):
        Predictor(Checkpoint.load(small_checkpoint), **options)


def test_learned_positions_refuse_another_window():
    from models.backbones import build
    from models.card import Card

    task = Task.load("glioma").model_copy(update={"patch_size": (32, 32, 32)})
    card = Card(
        name="fixed", task=task, backbone="m2ftrans", width=8, regime="idt", method="none", missing_rates={}
    )  # fmt: skip
    network = build("m2ftrans", task, 8)
    assert Predictor(Checkpoint(card, network), window=(32, 32, 32)).window == (32, 32, 32)
    with pytest.raises(OptionError, match="learned positions are made for 32 x 32 x 32"):
        Predictor(Checkpoint(card, network), window=(48, 48, 48))


def test_bfloat16_is_close_or_refused(small_checkpoint, predictor, scans):
    intake = take_in({m: Volume.load(scans[m]) for m in ("flair", "t1ce")}, predictor.task)
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        with pytest.raises(OptionError, match="no bfloat16 arithmetic"):
            Predictor(Checkpoint.load(small_checkpoint), precision="bfloat16")
        return
    half = Predictor(Checkpoint.load(small_checkpoint), precision="bfloat16").probabilities(intake)
    assert half.dtype == np.float32
    assert np.abs(half - predictor.probabilities(intake)).mean() < 0.02


def test_the_largest_is_the_first_of_equals_as_numpy_has_it():
    rng = np.random.default_rng(0)
    p = rng.integers(0, 4, (5, 6, 7, 8)).astype(np.float32)
    np.testing.assert_array_equal(largest(p), np.argmax(p, axis=0))


def test_a_predictor_works_in_a_thread_too(predictor, scans):
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(predictor.segment, {"t1": scans["t1"]}).result()
    np.testing.assert_array_equal(there.classes, predictor.segment({"t1": scans["t1"]}).classes)


def test_importing_the_predictor_imports_no_monai():
    code = "import sys, models.predictor; print(sorted({'monai', 'scipy.signal', 'pandas'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == "[]"
