"""`passion prepare`: every naming, every kind of broken case, and re-runs."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from models.intake import take_in
from models.task import Task
from models.volume import Volume
from training.cases import PreparedDataset
from training.cli import app
from training.errors import UserError
from training.phantom import PhantomSubject, make_subject
from training.prepare import Report, find_cases, prepare_dataset

GLIOMA = Task.load("glioma")
# Glioma on a coarse grid, so that a phantom of 6 mm voxels is not blown up to 1 mm.
TASK = Task.model_validate(
    GLIOMA.model_dump() | {"spacing": (6.0, 6.0, 6.0), "patch_size": (16, 16, 16), "min_crop": 20}
)
NEW_NAMES = {"flair": "t2f", "t1ce": "t1c", "t1": "t1n", "t2": "t2w", "seg": "seg"}


@lru_cache
def phantom(index: int = 1) -> PhantomSubject:
    return make_subject(3, index, (40, 40, 26), 6.0)


def save(path: Path, data: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, affine), path)


def brats(folder: Path, name: str, *, index: int = 1, style: str = "{id}_{what}.nii.gz", new: bool = False) -> Path:
    """A subject's folder; `new`: the names and label values of BraTS 2023."""
    made = phantom(index)
    for what, data in {**made.images, "seg": made.labels}.items():
        values = np.where(data == 4, 3, data).astype(np.uint8) if new and what == "seg" else data
        file = style.format(id=name, what=NEW_NAMES[what] if new else what)
        save(folder / name / file, values, made.affine)
    return folder / name


def rewrite(path: Path, change) -> None:
    image = nibabel.load(path)
    data = change(np.asarray(image.dataobj).copy())
    save(path, data, image.affine)


def problem(source: Path, out: Path) -> str:
    """Why the case `bad` was skipped, beside the sound case `good`."""
    report = prepare_dataset(source, out, TASK)
    assert report.prepared == ["good"]
    assert list(report.broken) == ["bad"]
    assert PreparedDataset.open(out).ids == ("good",)
    assert json.loads((out / "report.json").read_text())["broken"] == report.broken
    assert not (out / "bad").exists()
    assert "\n" not in report.broken["bad"]
    return report.broken["bad"]


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    brats(folder, "good")
    return folder


@pytest.fixture
def bad(source) -> Path:
    return brats(source, "bad", index=2)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def test_arrays_are_what_serving_sees(source, out):
    prepare_dataset(source, out, TASK)
    paths = {name: source / "good" / f"good_{name}.nii.gz" for name in TASK.names}
    served = take_in({name: Volume.load(path) for name, path in paths.items()}, TASK)
    dataset = PreparedDataset.open(out)
    case = dataset.case("good")
    assert case.modalities == list(TASK.names)
    for name in TASK.names:
        array = np.asarray(case.image(name))
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert np.array_equal(array, served.arrays[name])
    labels = np.asarray(case.labels())
    assert labels.dtype == np.uint8
    assert np.array_equal(served.restore_classes(labels), TASK.read_labels(phantom().labels))
    brain = sum(served.arrays.values()) > 0
    for name in TASK.names:
        mean, std = case.statistics(name)
        assert mean == pytest.approx(served.arrays[name][brain].mean(), rel=1e-5)
        assert std == pytest.approx(served.arrays[name][brain].std(), rel=1e-5)
    assert case.record["label_voxels"] == np.bincount(labels.ravel(), minlength=4).tolist()
    assert case.record["spacing"] == [6.0, 6.0, 6.0]
    assert list(case.shape) == list(labels.shape)


@pytest.mark.parametrize(
    ("style", "new"),
    [
        ("{id}_{what}.nii.gz", False),
        ("{id}_{what}.nii", False),
        ("{id}-{what}.nii.gz", True),
        ("{id}-{what}.nii", True),
        ("{what}.nii.gz", False),
    ],
)
def test_namings(tmp_path, out, style, new):
    brats(tmp_path / "source", "BraTS-GLI-00001-000", style=style, new=new)
    report = prepare_dataset(tmp_path / "source", out, TASK)
    assert report.prepared == ["BraTS-GLI-00001-000"]
    assert report.label_values == {"enhancing tumour": 3 if new else 4}
    case = PreparedDataset.open(out).case("BraTS-GLI-00001-000")
    assert case.modalities == list(TASK.names)
    assert case.record["label_voxels"][3] == (phantom().labels == 4).sum()


def test_names_of_bids(tmp_path, out):
    names = {"flair": "FLAIR", "t1ce": "ce-gd_run-1_T1w", "t1": "run-1_T1w", "t2": "acq-3d_T2w", "seg": "seg"}
    for what, data in {**phantom().images, "seg": phantom().labels}.items():
        save(tmp_path / "source" / "sub-01" / "anat" / f"sub-01_{names[what]}.nii.gz", data, phantom().affine)
    assert prepare_dataset(tmp_path / "source", out, TASK).prepared == ["sub-01"]
    assert PreparedDataset.open(out).case("sub-01").modalities == list(TASK.names)


def test_case_of_letters_does_not_matter(tmp_path, out):
    folder = brats(tmp_path / "source", "A", style="{id}_{what}.nii")
    for path in list(folder.iterdir()):
        path.rename(folder / path.name.replace("_flair", "_FLAIR").replace("_t1ce.nii", "_T1Gd.NII"))
    assert prepare_dataset(tmp_path / "source", out, TASK).prepared == ["A"]


def test_grades_in_folders_and_unrelated_files(tmp_path, out):
    source = tmp_path / "source"
    brats(source / "HGG", "Brats18_A_1")
    brats(source / "LGG", "Brats18_B_1", index=2)
    (source / "survival_data.csv").write_text("x")
    (source / "HGG" / "Brats18_A_1" / "notes_t1.txt").write_text("x")
    (source / "HGG" / "Brats18_A_1" / "._Brats18_A_1_t1.nii.gz").write_bytes(b"resource fork")
    shutil.copytree(source / "HGG", source / "__MACOSX" / "HGG")
    save(source / "HGG" / "Brats18_A_1" / "Brats18_A_1_adc.nii.gz", np.ones((4, 4, 4), np.uint8), np.eye(4))
    report = prepare_dataset(source, out, TASK)
    assert report.prepared == ["Brats18_A_1", "Brats18_B_1"]
    assert not report.broken


def test_all_files_in_one_folder(tmp_path, out):
    for index, name in ((1, "A_1"), (2, "B-2")):
        folder = brats(tmp_path / "made", name, index=index)
        for path in folder.iterdir():
            (tmp_path / "flat").mkdir(exist_ok=True)
            path.rename(tmp_path / "flat" / path.name)
    assert prepare_dataset(tmp_path / "flat", out, TASK).prepared == ["A_1", "B-2"]


def test_the_odd_labels_of_brats_2020_are_read(tmp_path, out):
    folder = brats(tmp_path / "source", "BraTS20_Training_355", style="{id}_{what}.nii")
    (folder / "BraTS20_Training_355_seg.nii").rename(folder / "W39_1998.09.19_Segm.nii")
    assert prepare_dataset(tmp_path / "source", out, TASK).prepared == ["BraTS20_Training_355"]


def test_a_modality_may_be_missing(source, bad, out):
    (bad / "bad_t1ce.nii.gz").unlink()
    (bad / "bad_flair.nii.gz").unlink()
    report = prepare_dataset(source, out, TASK)
    assert report.prepared == ["bad", "good"]
    assert report.incomplete == {"bad": ["flair", "t1ce"]}
    assert PreparedDataset.open(out).case("bad").modalities == ["t1", "t2"]


def remove_seg(case: Path) -> None:
    (case / "bad_seg.nii.gz").unlink()


def truncate(case: Path) -> None:
    path = case / "bad_t1.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncate_seg(case: Path) -> None:
    path = case / "bad_seg.nii.gz"
    path.write_bytes(path.read_bytes()[:-30])


def garble(case: Path) -> None:
    (case / "bad_t2.nii.gz").write_bytes(b"not an image")


def empty_file(case: Path) -> None:
    (case / "bad_t2.nii.gz").write_bytes(b"")


def reshape(case: Path) -> None:
    rewrite(case / "bad_t1ce.nii.gz", lambda d: d[:-1])


def reshape_seg(case: Path) -> None:
    rewrite(case / "bad_seg.nii.gz", lambda d: d[:, :-2])


def put(value: float):
    def change(data: np.ndarray) -> np.ndarray:
        data = data.astype(np.float32)
        data[20, 20, 13] = value
        return data

    return change


def nan(case: Path) -> None:
    rewrite(case / "bad_flair.nii.gz", put(np.nan))


def infinite(case: Path) -> None:
    rewrite(case / "bad_flair.nii.gz", put(np.inf))


def foreign_label(case: Path) -> None:
    rewrite(case / "bad_seg.nii.gz", lambda d: put(7)(d).astype(np.uint8))


def half_label(case: Path) -> None:
    rewrite(case / "bad_seg.nii.gz", put(1.5))


def empty_brain(case: Path) -> None:
    rewrite(case / "bad_t1.nii.gz", np.zeros_like)


def flat_brain(case: Path) -> None:
    for name in ("flair", "t1ce", "t2"):
        (case / f"bad_{name}.nii.gz").unlink()
    rewrite(case / "bad_t1.nii.gz", lambda d: (d > 0).astype(np.uint8))


def labels_only(case: Path) -> None:
    for name in TASK.names:
        (case / f"bad_{name}.nii.gz").unlink()


def twice(case: Path) -> None:
    shutil.copy(case / "bad_t1ce.nii.gz", case / "bad-t1c.nii.gz")


def move_seg(case: Path) -> None:
    image = nibabel.load(case / "bad_seg.nii.gz")
    save(case / "bad_seg.nii.gz", np.asarray(image.dataobj).copy(), image.affine + np.eye(4, k=3) * 50)


def four_volumes(case: Path) -> None:
    rewrite(case / "bad_t1.nii.gz", lambda d: np.stack([d, d], axis=-1))


def dead_link(case: Path) -> None:
    (case / "bad_t1.nii.gz").unlink()
    (case / "bad_t1.nii.gz").symlink_to(case / "nowhere.nii.gz")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (remove_seg, ["no segmentation", "bad_seg.nii.gz"]),
        (truncate, ["bad_t1.nii.gz", "incomplete"]),
        (truncate_seg, ["bad_seg.nii.gz", "incomplete"]),
        (garble, ["bad_t2.nii.gz", "not a readable NIfTI"]),
        (empty_file, ["bad_t2.nii.gz", "not a readable NIfTI"]),
        (reshape, ["shapes differ", "bad_t1ce.nii.gz", "(39, 40, 26)"]),
        (reshape_seg, ["shapes differ", "bad_seg.nii.gz", "(40, 38, 26)"]),
        (nan, ["bad_flair.nii.gz", "NaN"]),
        (infinite, ["bad_flair.nii.gz", "infinite"]),
        (foreign_label, ["label values [7]"]),
        (half_label, ["label values [1.5]"]),
        (empty_brain, ["t1", "every voxel is 0"]),
        (flat_brain, ["t1", "no contrast"]),
        (labels_only, ["no modality"]),
        (twice, ["two files for t1ce", "bad-t1c.nii.gz"]),
        (move_seg, ["bad_seg.nii.gz", "affines differ"]),
        (four_volumes, ["bad_t1.nii.gz", "3-D"]),
        (dead_link, ["bad_t1.nii.gz"]),
    ],
)
def test_a_broken_case_is_skipped_and_says_why(source, bad, out, harm, said):
    harm(bad)
    why = problem(source, out)
    assert all(part in why for part in said), why


def test_one_case_in_two_folders(source, bad, out):
    shutil.copytree(bad, source / "again" / "bad")
    assert "two folders" in problem(source, out)


def test_strict_refuses_and_leaves_the_report(source, bad, out):
    remove_seg(bad)
    with pytest.raises(UserError, match=r"1 of 2 cases are broken.*bad: no segmentation"):
        prepare_dataset(source, out, TASK, strict=True)
    assert not (out / "dataset.json").exists()
    assert json.loads((out / "report.json").read_text())["broken"].keys() == {"bad"}


def test_nothing_usable_is_an_error(tmp_path, out):
    folder = brats(tmp_path / "source", "bad")
    remove_seg(folder)
    with pytest.raises(UserError, match="none of 1 cases"):
        prepare_dataset(tmp_path / "source", out, TASK)
    with pytest.raises(UserError, match="no scans found"):
        find_cases(out, TASK)
    with pytest.raises(UserError, match="no such folder"):
        find_cases(tmp_path / "none", TASK)


def test_mixed_values_of_a_label_are_refused_by_name(tmp_path, out):
    brats(tmp_path / "source", "old")
    brats(tmp_path / "source", "new", index=2, new=True)
    with pytest.raises(UserError, match=r"enhancing tumour: 3 in 1 \(new\) and 4 in 1 \(old\)"):
        prepare_dataset(tmp_path / "source", out, TASK)
    assert not (out / "dataset.json").exists()


def test_the_data_sets_own_label_values_are_kept(tmp_path, out):
    brats(tmp_path / "source", "new", new=True)
    prepare_dataset(tmp_path / "source", out, TASK)
    task = PreparedDataset.open(out).task
    assert [label.value for label in task.labels] == [0, 1, 2, 3]
    assert task.write_labels(np.array([3])).tolist() == [3]
    assert task.read_labels(np.array([4])).tolist() == [3]


def stamps(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*.npy")}


def test_a_rerun_makes_only_what_changed(source, bad, out):
    assert prepare_dataset(source, out, TASK).prepared == ["bad", "good"]
    before = stamps(out)
    report = prepare_dataset(source, out, TASK)
    assert (report.prepared, report.up_to_date) == ([], ["bad", "good"])
    assert stamps(out) == before

    rewrite(bad / "bad_t1.nii.gz", lambda d: d * 2)
    report = prepare_dataset(source, out, TASK)
    assert (report.prepared, report.up_to_date) == (["bad"], ["good"])
    assert {p for p, t in stamps(out).items() if before[p] != t} == {p for p in before if "/bad/" in p}

    other = Task.model_validate(TASK.model_dump() | {"min_crop": 24})
    assert prepare_dataset(source, out, other).prepared == ["bad", "good"]


def test_a_damaged_prepared_case_is_made_again(source, out):
    prepare_dataset(source, out, TASK)
    (out / "good" / "t1.npy").unlink()
    assert prepare_dataset(source, out, TASK).prepared == ["good"]
    (out / "good" / "seg-labelled.npy").unlink()  # as an earlier version left it
    assert prepare_dataset(source, out, TASK).prepared == ["good"]
    (out / "good" / "case.json").write_text("{")
    assert prepare_dataset(source, out, TASK).prepared == ["good"]


def test_cases_gone_or_broken_since_leave_the_data_set(source, bad, out):
    prepare_dataset(source, out, TASK)
    remove_seg(bad)
    report = prepare_dataset(source, out, TASK)
    assert report.removed == ["bad"]
    assert PreparedDataset.open(out).ids == ("good",)
    shutil.rmtree(bad)
    assert prepare_dataset(source, out, TASK).removed == []


def test_what_a_killed_run_left_is_swept_up(source, out):
    (out / ".partial-xyz").mkdir(parents=True)
    prepare_dataset(source, out, TASK)
    assert sorted(p.name for p in out.iterdir()) == ["dataset.json", "good", "report.json"]


def test_the_source_is_never_written_to(source, out):
    with pytest.raises(UserError, match="is the source"):
        prepare_dataset(source, source, TASK)
    with pytest.raises(UserError, match="is the source"):
        prepare_dataset(source, source / "good" / "..", TASK)
    brats(out, "good")
    with pytest.raises(UserError, match="no prepared case"):
        prepare_dataset(source, out, TASK)
    assert (out / "good" / "good_t1.nii.gz").is_file()


def test_links_to_cases_are_followed_but_not_in_circles(source, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "case").symlink_to(source / "good")
    (source / "good" / "up").symlink_to(tmp_path / "links")
    assert [c.id for c in find_cases(tmp_path / "links", TASK)] == ["good"]


def run(*arguments: str):
    return CliRunner().invoke(app, ["prepare", *arguments], env={"COLUMNS": "200"})


@pytest.fixture
def task_file(tmp_path) -> str:
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK.model_dump(mode="json")))
    return str(tmp_path / "task.yaml")


def test_the_command_in_parallel_with_a_report(source, bad, out, task_file):
    brats(source, "more", index=2)
    remove_seg(bad)
    result = run(str(source), str(out), "--task", task_file, "--workers", "2")
    assert result.exit_code == 0, result.output
    assert "2 cases" in result.output
    assert "no segmentation" in result.output
    assert PreparedDataset.open(out).ids == ("good", "more")
    serial: Report = prepare_dataset(source, out.with_name("serial"), TASK)
    assert serial.prepared == ["good", "more"]
    for path in out.rglob("*.npy"):
        assert path.read_bytes() == (out.with_name("serial") / path.relative_to(out)).read_bytes()


def test_the_command_strictly(source, bad, out, task_file):
    remove_seg(bad)
    result = run(str(source), str(out), "--task", task_file, "--workers", "1", "--strict")
    assert isinstance(result.exception, UserError)
    assert isinstance(run(str(source), str(out), "--task", "nonsense").exception, UserError)


def test_an_output_that_cannot_be_a_folder(source, out):
    out.write_text("a file")
    with pytest.raises(UserError, match="cannot make the folder"):
        prepare_dataset(source, out, TASK)
