"""What files are called: one table for both halves, which cannot import each other."""

from pathlib import Path

import pytest

import app.names
import models.names
from models.task import Task

ROOT = Path(__file__).parents[2]
GLIOMA, PROSTATE, MYOPS = (Task.load(name) for name in ("glioma", "prostate", "myops2020"))

both = pytest.mark.parametrize("names", [models.names, app.names], ids=["models", "app"])


def of(names, task):
    return names.FileNames({m.name: m.aliases for m in task.modalities}, task.label_suffixes)


def make(folder, *files):
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"never read")
    return folder


def test_the_two_are_one():
    ours, copy = ((ROOT / half / "names.py").read_text().split('"""\n', 1)[1] for half in ("models", "app"))
    assert ours == copy, "change models/names.py and app/names.py together"


@both
@pytest.mark.parametrize(
    ("name", "subject", "what"),
    [
        ("BraTS20_Training_001_flair.nii.gz", "BraTS20_Training_001", "flair"),
        ("BraTS20_Training_001_t1ce.nii", "BraTS20_Training_001", "t1ce"),
        ("BraTS-GLI-00000-000-t2f.nii.gz", "BraTS-GLI-00000-000", "flair"),
        ("BraTS-GLI-00000-000-t1c.nii.gz", "BraTS-GLI-00000-000", "t1ce"),
        ("BraTS-GLI-00000-000-t1n.nii.gz", "BraTS-GLI-00000-000", "t1"),
        ("BraTS-GLI-00000-000-t2w.nii.gz", "BraTS-GLI-00000-000", "t2"),
        ("ID_T1CE.NII.GZ", "ID", "t1ce"),
        ("FLAIR.nii", "", "flair"),
        ("sub-01_T1w.nii.gz", "sub-01", "t1"),
        ("sub-01_ce-gadolinium_T1w.nii.gz", "sub-01", "t1ce"),
        ("sub-01_ses-2_acq-mprage_ce-Gd_run-1_T1w.nii.gz", "sub-01_ses-2", "t1ce"),
        ("Sub-01_CE-gd_t1w.nii", "Sub-01", "t1ce"),
        ("sub-01_run-2_FLAIR.nii.gz", "sub-01", "flair"),
        ("sub-01_T2w.nii.gz", "sub-01", "t2"),
        ("sub-01_ce-gd_T1ce.nii.gz", "sub-01", "t1ce"),
        ("ID_seg.nii.gz", "ID", "seg"),
        ("sub-01_ce-gd_FLAIR.nii.gz", None, None),
        ("sub-01_T2star.nii.gz", None, None),
        ("ID_t1ce_brain.nii.gz", None, None),
        ("ID_t1.nii.gz.bak", None, None),
        ("ID_t1.mha", None, None),
        ("t1", None, None),
        ("IDt1.nii.gz", None, None),
    ],
)
def test_names_of_gliomas(names, name, subject, what):
    found = of(names, GLIOMA).read(name)
    assert (found and found.subject, found and found.what) == (subject, what)


@both
@pytest.mark.parametrize(
    ("task", "name", "what"),
    [
        (PROSTATE, "prostate_01_ADC.nii.gz", "adc"),
        (PROSTATE, "sub-3_T2w.nii.gz", "t2"),
        (PROSTATE, "sub-3_ce-gd_T1w.nii.gz", None),
        (PROSTATE, "sub-3_T1w.nii.gz", None),
        (MYOPS, "myops_training_101_C0.nii.gz", "bssfp"),
        (MYOPS, "myops_training_101_DE.nii.gz", "lge"),
        (MYOPS, "myops_training_101_gd.nii.gz", "seg"),
    ],
)
def test_names_of_other_tasks(names, task, name, what):
    found = of(names, task).read(name)
    assert (found and found.what) == what


@both
def test_a_task_for_enhanced_t1_alone(names):
    only = names.FileNames({"post": ("t1gd",)})
    assert only.read("sub-1_ce-gd_T1w.nii.gz").what == "post"
    assert only.read("sub-1_T1w.nii.gz") is None
    assert only.read("x_t1c.nii.gz").what == "post"


@both
def test_a_folder_says_what_was_taken_and_what_was_left(names, tmp_path):
    make(tmp_path, "ID_t2.nii.gz", "ID_flair.nii", "ID_seg.nii.gz", "ID_dwi.nii.gz", "ID_brain_mask.nii", "notes.txt")
    make(tmp_path, ".ID_t1.nii.gz", "old/ID_t1.nii.gz")
    scans = of(names, GLIOMA).find(tmp_path)
    assert list(scans.files) == ["flair", "t2"], "in the model's order"
    assert scans.said == [
        "flair: ID_flair.nii",
        "t2: ID_t2.nii.gz",
        "not taken: ID_brain_mask.nii (labels, no scan)",
        "not taken: ID_dwi.nii.gz (the name is of no modality of the model)",
        "not taken: ID_seg.nii.gz (labels, no scan)",
    ]
    assert scans.warnings == []


@both
@pytest.mark.parametrize("place", ["", "anat/", "ses-1/anat/", "ses-1/"])
def test_bids_folders(names, tmp_path, place):
    visit = "_ses-1" if "ses" in place else ""
    make(tmp_path, f"{place}sub-7{visit}_T1w.nii.gz", f"{place}sub-7{visit}_ce-gd_T1w.nii.gz", "func/sub-7_bold.nii.gz")
    scans = of(names, GLIOMA).find(tmp_path)
    assert {m: p.name for m, p in scans.files.items()} == {
        "t1ce": f"sub-7{visit}_ce-gd_T1w.nii.gz",
        "t1": f"sub-7{visit}_T1w.nii.gz",
    }
    assert not scans.left


@both
@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["A_t1.nii.gz", "A_t1.nii"], "two files for t1: A_t1.nii and A_t1.nii.gz; keep one, or name the scans with"),
        (["A_t1n.nii.gz", "A_T1.nii.gz"], "two files for t1"),
        (["sub-1_run-1_T1w.nii", "anat/sub-1_run-2_T1w.nii"], "two files for t1: anat/sub-1_run-2_T1w.nii and "),
        (["ses-1/sub-1_ses-1_T1w.nii", "ses-2/sub-1_ses-2_T2w.nii"], "scans of several sessions, ses-1 and ses-2"),
        (["sub-1_T1w.nii", "sub-2_T2w.nii"], "scans of sub-1 and sub-2: give a folder of one patient"),
        (["A_seg.nii.gz"], "expected ID_flair.nii.gz and its like (flair, t1ce, t1, t2); not taken: A_seg.nii.gz"),
        (["A/A_t1.nii.gz", "B/B_t1.nii.gz"], "it holds folders: give that of one patient"),
        (["readme"], "no scan found by name"),
    ],
)
def test_folders_that_are_refused(names, tmp_path, files, message):
    make(tmp_path, *files)
    with pytest.raises(names.FolderError) as caught:
        of(names, GLIOMA).find(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@both
def test_what_is_no_folder(names, tmp_path):
    make(tmp_path, "t1.nii.gz")
    with pytest.raises(names.FolderError, match=r"t1.nii.gz: is a file: give a folder, or name the scan"):
        of(names, GLIOMA).find(tmp_path / "t1.nii.gz")
    with pytest.raises(names.FolderError, match="none: no such folder"):
        of(names, GLIOMA).find(tmp_path / "none")


@both
def test_names_of_two_people_in_one_folder_are_said(names, tmp_path):
    make(tmp_path, "301_t1.nii.gz", "401_t2.nii.gz")
    assert of(names, GLIOMA).find(tmp_path).warnings == [
        "the files are named for 301 and 401: are they of one patient?"
    ]
