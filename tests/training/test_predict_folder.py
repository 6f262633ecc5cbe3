"""`passion predict` on folders: one patient, many patients, and the value of enhancing tumour."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from models.checkpoint import Checkpoint, save_checkpoint
from models.predictor import Predictor
from models.task import Task, TaskError
from training.cli import app
from training.errors import UserError

QUICK = ("--overlap", 0)
MODALITIES = ("flair", "t1ce", "t1", "t2")


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def good(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments):
    result = run(*arguments)
    assert isinstance(result.exception, UserError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


@pytest.fixture
def checkpoint(small_checkpoint, tmp_path):
    return shutil.copytree(small_checkpoint, tmp_path / "model")


@pytest.fixture(scope="session")
def scans(small_phantoms):
    """A patient's files by modality, and `seg`."""
    case = min(small_phantoms.iterdir())
    return {what: case / f"{case.name}_{what}.nii.gz" for what in (*MODALITIES, "seg")}


def patient(folder, scans, **names):
    """A folder with copies of a patient's scans, by modality, under other names."""
    for what, name in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(scans[what], path)
    return folder


@pytest.fixture
def cohort(tmp_path, scans):
    """Three patients: one named as BraTS, one as BIDS, and one whose only scan is damaged."""
    root = tmp_path / "cohort"
    patient(root / "a", scans, flair="a_flair.nii.gz", t2="a_t2.nii.gz", seg="a_seg.nii.gz")
    patient(root / "b", scans, t1="anat/sub-b_T1w.nii.gz")
    (root / "c").mkdir()
    (root / "c" / "c-t1c.nii.gz").write_bytes(b"no scan")
    (root / "notes.txt").write_text("not a patient")
    return root


@pytest.mark.parametrize(
    "names",
    [
        {"flair": "x_flair.nii.gz", "t1ce": "x_t1ce.nii.gz"},
        {"flair": "x-T2F.nii.gz", "t1ce": "x-t1c.nii.gz"},
        {"flair": "anat/sub-1_FLAIR.nii.gz", "t1ce": "anat/sub-1_ce-gd_run-1_T1w.nii.gz"},
    ],
)
def test_a_folder_is_as_its_scans_by_name(checkpoint, scans, tmp_path, names):
    folder = patient(tmp_path / "patient", scans, **names, seg="x_seg.nii.gz")
    output = good("predict", checkpoint, folder, "-o", tmp_path / "folder.nii.gz", *QUICK)
    assert f"flair: {names['flair']}\nt1ce: {names['t1ce']}\nnot taken: x_seg.nii.gz (labels, no scan)\n" in output
    by_name = ("--flair", scans["flair"], "--t1ce", scans["t1ce"])
    good("predict", checkpoint, *by_name, "-o", tmp_path / "named.nii.gz", *QUICK)
    np.testing.assert_array_equal(voxels(tmp_path / "folder.nii.gz"), voxels(tmp_path / "named.nii.gz"))


def test_folders_that_cannot_be_had(checkpoint, scans, tmp_path):
    folder = patient(tmp_path / "p", scans, t1="p_t1.nii.gz", t2="p-t1n.nii.gz")
    mask = tmp_path / "m.nii.gz"
    assert "two files for t1" in refused("predict", checkpoint, folder, "-o", mask)
    assert "no such folder" in refused("predict", checkpoint, tmp_path / "none", "-o", mask)
    assert "not both" in refused("predict", checkpoint, folder, "--t1", scans["t1"], "-o", mask)
    assert "no scan given" in refused("predict", checkpoint, "-o", mask)
    assert "is a file: give a folder" in refused("predict", checkpoint, scans["t1"], "-o", mask)
    assert not mask.exists()
    alone = patient(tmp_path / "alone", scans, t1="p_t1.nii.gz")
    assert "is the scan of t1" in refused("predict", checkpoint, alone, "-o", alone / "p_t1.nii.gz")


@pytest.mark.parametrize(("options", "value"), [((), 3), (("--et-value", 3), 3), (("--et-value", 4), 4)])
def test_enhancing_tumour_has_the_value_asked_for(checkpoint, scans, tmp_path, options, value):
    loaded = Checkpoint.load(checkpoint)
    head = loaded.network.decoder_fuse.seg_layer
    head.weight.data.zero_()
    head.bias.data.copy_(torch.tensor([0.0, 0.0, 0.0, 9.0]))  # enhancing tumour everywhere
    save_checkpoint(checkpoint, loaded.card, loaded.network)
    mask = tmp_path / "m.nii.gz"
    output = good("predict", checkpoint, "--t1", scans["t1"], "-o", mask, *QUICK, *options)
    assert f"enhancing tumour is {value}" in output
    assert set(np.unique(voxels(mask))) == {0, value}
    header = nib.load(mask).header
    assert f"{value} enhancing tumour" in header["descrip"].item().decode()
    assert json.loads(header.extensions[0].get_content())["labels"][str(value)] == "enhancing tumour"
    assert header["cal_max"] == value


def test_other_values_of_labels_are_refused(checkpoint, scans, tmp_path, small_task_file):
    given = ("predict", checkpoint, "--t1", scans["t1"], "-o", tmp_path / "m.nii.gz")
    assert "knows enhancing tumour as 3 or 4" in refused(*given, "--et-value", 5)
    task = Task.load(small_task_file)
    assert [label.value for label in task.writing({"enhancing tumour": 3}).labels] == [0, 1, 2, 3]
    with pytest.raises(TaskError, match="oedema of task glioma-small cannot be written as 3: its value is 2"):
        task.writing({"oedema": 3})
    with pytest.raises(TaskError, match="has no label 'ET'"):
        task.writing({"ET": 3})


def test_a_task_without_enhancing_tumour_keeps_its_values(tmp_path, scans):
    import tiny_checkpoint

    prostate = Task.load("prostate")
    small = Task.model_validate(prostate.model_dump() | {"patch_size": (16,) * 3, "spacing": (6,) * 3, "min_crop": 16})
    folder = tiny_checkpoint.make(tmp_path / "prostate", task=small)
    given = ("predict", folder, "--t2", scans["t2"], "-o", tmp_path / "m.nii.gz", *QUICK)
    assert "no region ET" in refused(*given, "--et-value", 3)
    good(*given)
    comment = json.loads(nib.load(tmp_path / "m.nii.gz").header.extensions[0].get_content())
    assert comment["labels"] == {"0": "background", "1": "peripheral zone", "2": "transition zone"}


def test_evaluate_takes_either_value(checkpoint, scans):
    """Labels of both conventions are one truth, whatever predict writes."""
    predictor = Predictor(Checkpoint.load(checkpoint), overlap=0)
    found = predictor.segment({"t1": scans["t1"]})
    for value in (3, 4):
        mask = np.asarray(found.writing({"enhancing tumour": value}).mask.dataobj)
        np.testing.assert_array_equal(predictor.task.read_labels(mask), found.classes)


def test_a_batch_goes_on_after_a_failure_and_does_what_is_left(checkpoint, cohort, scans, tmp_path):
    out = tmp_path / "out"
    command = ("predict", checkpoint, cohort, "--batch", "-o", out, "--overlap", 0)
    result = run(*command)
    assert result.exit_code == 1, result.output
    assert "2 patients segmented, 0 were done before, 1 failed" in result.output
    assert sorted(p.name for p in out.iterdir()) == ["a.nii.gz", "b.nii.gz", "report.csv", "report.json"]
    report = json.loads((out / "report.json").read_text())
    a, b, c = report["patients"]
    weights = json.loads((checkpoint / "card.json").read_text())["weights_sha256"]
    assert (a["modalities"], a["missing"], a["left"]) == (
        ["flair", "t2"],
        ["t1ce", "t1"],
        {"a_seg.nii.gz": "labels, no scan"},
    )
    assert b["files"]["t1"]["path"] == "anat/sub-b_T1w.nii.gz"
    assert (c["state"], c["mask"], c["modalities"]) == ("failed", None, ["t1ce"])
    assert c["error"].startswith("t1ce: not a readable NIfTI file")
    assert {row["weights_sha256"] for row in report["patients"]} == {weights}
    assert report["labels"] == {"1": "necrotic core", "2": "oedema", "3": "enhancing tumour"}
    rows = list(csv.DictReader((out / "report.csv").open()))
    assert [(r["patient"], r["state"], r["modalities"]) for r in rows] == [
        ("a", "done", "flair+t2"),
        ("b", "done", "t1"),
        ("c", "failed", "t1ce"),
    ]
    voxel = abs(np.linalg.det(nib.load(out / "a.nii.gz").affine[:3, :3])) / 1000
    assert float(rows[0]["WT_ml"]) == pytest.approx((voxels(out / "a.nii.gz") > 0).sum() * voxel, rel=1e-4)
    assert "3 enhancing tumour" in rows[0]["labels"]
    good("predict", checkpoint, cohort / "a", "-o", tmp_path / "alone.nii.gz", *QUICK)
    np.testing.assert_array_equal(voxels(out / "a.nii.gz"), voxels(tmp_path / "alone.nii.gz"))

    before = (out / "a.nii.gz").stat().st_mtime_ns
    shutil.copy(scans["t1ce"], cohort / "c" / "c-t1c.nii.gz")
    (out / "b.nii.gz").unlink()
    assert "2 patients segmented, 1 were done before, 0 failed" in good(*command)
    assert (out / "a.nii.gz").stat().st_mtime_ns == before
    shutil.copy(scans["t1"], cohort / "a" / "a_t1.nii.gz")
    assert "1 patients segmented, 2 were done before" in good(*command)
    shutil.rmtree(cohort / "b")
    (checkpoint / "weights.safetensors").unlink()  # with nothing left to do, nothing is loaded
    assert "0 patients segmented, 2 were done before" in good(*command)

    said = refused(*command, "--et-value", 4)
    assert said.startswith(f"{out}: holds masks made with labels ")
    assert "overlap" in refused(*command[:-2])


def test_batches_that_cannot_be(checkpoint, cohort, tmp_path):
    def batch(root, out):
        return refused("predict", checkpoint, root, "--batch", "-o", out)

    out = tmp_path / "out"
    assert "holds no folders" in batch(cohort / "a", out)
    assert "cannot be read" in batch(tmp_path / "none", out)
    assert "choose a folder elsewhere" in batch(cohort, cohort / "masks")
    assert "-o is the folder" in batch(cohort, tmp_path / "m.nii.gz")
    assert "-o is the folder" in batch(cohort, cohort / "notes.txt")
    assert "give a folder with one folder" in refused("predict", checkpoint, "--batch", "-o", out)
    out.mkdir(exist_ok=True)
    (out / "a.nii.gz").write_bytes(b"somebody's scan")
    assert "a.nii.gz exists, and no report.json" in batch(cohort, out)
    assert (out / "a.nii.gz").read_bytes() == b"somebody's scan"
    (out / "report.json").write_text("{}")
    assert "no report of a batch, or a damaged one" in batch(cohort, out)


def test_sessions_of_bids_are_patients_of_their_own(checkpoint, scans, tmp_path):
    root = tmp_path / "bids"
    for visit in ("ses-1", "ses-2"):
        patient(root / "sub-01", scans, t1=f"{visit}/anat/sub-01_{visit}_T1w.nii.gz")
    patient(root / "derivatives", scans, seg="sub-01_dseg.nii.gz")
    (root / "dataset_description.json").write_text("{}")
    good("predict", checkpoint, root, "--batch", "-o", tmp_path / "out", *QUICK)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == [
        "sub-01_ses-1.nii.gz",
        "sub-01_ses-2.nii.gz",
    ]


@pytest.fixture
def many(tmp_path, scans):
    """More patients than a test has time for."""
    for index in range(40):
        patient(tmp_path / "many" / f"p{index:02d}", scans, t1="t1.nii.gz", t2="t2.nii.gz")
    return tmp_path / "many"


def two_done(out):
    """Waits until a batch is under way."""
    end = time.monotonic() + 60
    while len(list(out.glob("p*.nii.gz"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)


def check_stopped(out, said):
    """What a batch of 40 leaves when it is stopped; how many are done."""
    counted = re.search(r"stopped: (\d+) of 40 are done; the same command goes on", said)
    assert counted, said
    assert "Traceback" not in said
    report = json.loads((out / "report.json").read_text())
    assert len(report["patients"]) == int(counted[1]) < 40
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]
    for path in out.glob("*.nii.gz"):
        assert voxels(path).shape == (40, 40, 26)
    return int(counted[1])


def test_ctrl_c_leaves_whole_files(checkpoint, many, tmp_path):
    command = ["predict", checkpoint, many, "--batch", "-o", tmp_path / "out", *QUICK]
    process = subprocess.Popen(
        [sys.executable, "-m", "training", *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        two_done(tmp_path / "out")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, said
    check_stopped(tmp_path / "out", said)


def test_a_batch_that_a_scheduler_stopped_goes_on(checkpoint, many, tmp_path):
    def stop():
        two_done(tmp_path / "out")
        os.kill(os.getpid(), signal.SIGTERM)

    command = ["predict", checkpoint, many, "--batch", "-o", tmp_path / "out", *QUICK]
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # were it to come late, the tests would end
    try:
        stopper = threading.Thread(target=stop)
        stopper.start()
        result = run(*command)
        stopper.join()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN, "put back as it was"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 130, result.output
    done = check_stopped(tmp_path / "out", result.output)
    for folder in sorted(many.iterdir())[done + 1 :]:
        shutil.rmtree(folder)
    assert f"1 patients segmented, {done} were done before" in good(*command)
