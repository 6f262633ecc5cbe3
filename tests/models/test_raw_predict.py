"""Raw scans through the predictor: what is prepared stays as it was, and the mask lies where it was asked for."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from raw_scans import MOVED, moved, patient
from typer.testing import CliRunner

from models.checkpoint import Checkpoint
from models.predictor import Predictor
from models.raw.prepare import finest, prepare
from models.task import Task, TaskError
from training.cli import app
from training.errors import UserError
from training.metrics import dice

DEMO = Path(__file__).parents[2] / "models" / "checkpoints" / "glioma-phantom-rfnet"


@pytest.fixture(scope="module")
def predictor():
    return Predictor(Checkpoint.load(DEMO))


def silent(_stage, _fraction):
    pass


def test_auto_leaves_prepared_scans_as_they_are(predictor, one_thread):
    scans = patient()
    task = predictor.task
    prepared = prepare(scans, task, "auto", silent)
    assert list(prepared.volumes) == list(scans)
    assert all(prepared.volumes[name] is scan for name, scan in scans.items())
    assert prepared.warnings == ()
    again = predictor.segment(scans, preprocess="auto")
    np.testing.assert_array_equal(again.classes, predictor.segment(scans).classes)


@pytest.fixture(scope="module")
def apart():
    return {"t1": patient()["t1"], "flair": moved("flair")}


@pytest.fixture(scope="module")
def on_t1(predictor, apart):
    stages = []
    result = predictor.segment(apart, lambda stage, _: stages.append(stage), preprocess="auto")
    assert "preparing" in stages
    return result


def test_moved_scans_are_brought_back(predictor, apart, on_t1):
    result, scans = on_t1, apart
    assert result.warnings[0].startswith("The scans were registered to t1: flair by ")
    want = predictor.segment({name: patient()[name] for name in scans}).classes > 0
    assert want.any()
    good, bad = dice(result.classes > 0, want), dice(predictor.segment(scans).classes > 0, want)
    assert good > 0.8
    assert good > bad + 0.2


def test_the_mask_lies_on_the_grid_that_is_named(predictor, apart, on_t1, tmp_path):
    scans = apart
    on_flair = predictor.segment(scans, preprocess="raw", grid="t2f")
    on_flair.save(tmp_path / "mask.nii.gz")
    mask = nib.load(tmp_path / "mask.nii.gz")
    assert mask.shape == scans["flair"].data.shape
    np.testing.assert_allclose(mask.affine, scans["flair"].grid.affine, atol=1e-4)
    # The middle of the tumour moved as the patient did.
    places = []
    for result, grid in ((on_t1, scans["t1"].grid), (on_flair, scans["flair"].grid)):
        middle = np.argwhere(result.classes > 0).mean(0)
        places.append(grid.affine[:3, :3] @ middle + grid.affine[:3, 3])
    true = MOVED.matrix(scans["t1"].grid)
    assert np.linalg.norm(true[:3, :3] @ places[0] + true[:3, 3] - places[1]) < 2
    assert on_flair.volumes_ml["WT"] == pytest.approx(on_t1.volumes_ml["WT"], rel=0.08)


def test_a_grid_is_one_of_a_scan_that_is_given(predictor):
    with pytest.raises(TaskError, match="cannot lie on the grid of t2, which is not given"):
        predictor.segment({"t1": patient()["t1"]}, grid="t2")


def test_the_finest_scan_is_the_reference():
    task = Task.load("glioma")
    assert finest({"t1": patient()["t1"], "flair": moved("flair")}, task) == "t1"
    assert finest({"t2": patient()["t2"], "t1ce": patient()["t1ce"]}, task) == "t1ce"


def test_what_cannot_be_prepared_is_said():
    with pytest.raises(TaskError, match="preprocess 'maybe' is none of auto, none, raw"):
        prepare(patient(), Task.load("glioma"), "maybe", silent)
    with pytest.raises(TaskError, match="preprocess raw is for scans of the head"):
        prepare({"t2": patient()["t2"]}, Task.load("prostate"), "raw", silent)


def run(*arguments):
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def test_the_command_prints_the_warnings(tmp_path):
    for name in ("t1", "t2"):
        scan = patient()[name]
        nib.save(nib.Nifti1Image(scan.data, scan.grid.affine), tmp_path / f"{name}.nii")
    out = tmp_path / "mask.nii"
    result = run(DEMO, "-o", out, "--t1", tmp_path / "t2.nii", "--t2", tmp_path / "t1.nii", "--grid", "t2")
    assert result.exit_code == 0, result.output
    assert result.output.count("was another scan") == 2
    assert out.exists()


def test_raw_and_another_way_exclude_each_other(tmp_path):
    result = run(DEMO, "-o", tmp_path / "mask.nii", "--t1", "a.nii", "--raw", "--preprocess", "none")
    assert isinstance(result.exception, UserError)
    assert "--raw is --preprocess raw" in str(result.exception)
