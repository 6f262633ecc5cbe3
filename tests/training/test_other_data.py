"""Other data than gliomas: hearts in thick slices and prostates in nnU-Net's layout, files truly missing."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from small_organs import HEART, HEART_SHAPE, PROSTATE, heart, short_axis, write_myops, write_nnunet
from typer.testing import CliRunner

from models.checkpoint import Checkpoint
from models.task import Task
from training.cases import PreparedDataset
from training.cli import app
from training.errors import UserError
from training.missingness import MissingnessTable
from training.prepare import find_cases

GLIOMA = Task.load("glioma")
SHIPPED_PROSTATE = Task.load("prostate")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def task_file(folder: Path, task: Task) -> Path:
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(task.model_dump(mode="json")))
    return path


def train(folder: Path, method: str = "passion") -> Path:
    """One epoch on what was prepared and split; the checkpoint."""
    config = {"data": folder / "prepared", "split": folder / "split", "out": folder / "run", "device": "cpu"}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({k: str(v) for k, v in config.items()} | {"epochs": 1, "method": method}))
    run("train", path)
    return folder / "run" / "checkpoint"


def scores(folder: Path) -> dict[str, set[str]]:
    """The subsets scored, by case."""
    found: dict[str, set[str]] = {}
    for row in csv.DictReader((folder / "scores.csv").open()):
        found.setdefault(row["case"], set()).add(row["modalities"])
    return found


@pytest.mark.slow
def test_hearts_with_files_missing_from_raw_to_mask(tmp_path, one_thread):
    raw = tmp_path / "raw"
    sequences = {
        "myops_training_101": ("bssfp", "lge", "t2"),
        "myops_training_102": ("bssfp", "t2"),
        "myops_training_103": ("lge",),
        "myops_training_104": ("bssfp", "lge", "t2"),
        "myops_training_105": ("bssfp", "lge"),
        "myops_training_106": (),
    }
    for seed, (case, has) in enumerate(sequences.items()):
        write_myops(raw, case, seed, has)
    ids = sorted(set(sequences) - {"myops_training_106"})
    task = task_file(tmp_path, HEART)

    output = run("prepare", raw, tmp_path / "prepared", "--task", task, "--workers", "1")
    assert "myops_training_106" in output
    assert "no modality, only labels" in output
    assert "no file of lge in 1, bssfp in 1, t2 in 2" in output
    dataset = PreparedDataset.open(tmp_path / "prepared")
    assert list(dataset.ids) == ids
    for case in map(dataset.case, ids):
        assert tuple(case.modalities) == sequences[case.id]
        # However the stack lies in the body, slices are on the third axis: 5 x 15 mm in steps of 5 mm, padded to 16.
        assert case.shape == (24, 24, 16)
        assert {path.stem for path in case.folder.glob("*.npy")} == {*sequences[case.id], "seg", "seg-labelled"}
        assert set(np.unique(case.labels())) == {0, 1, 2, 3, 4, 5}

    lists = tmp_path / "lists"
    lists.mkdir()
    for part, names in {"train": ids[:3], "val": [], "test": ids[3:]}.items():
        (lists / f"{part}.txt").write_text("".join(f"{n}\n" for n in names))
    output = run("split", tmp_path / "prepared", "--out", tmp_path / "split", "--lists", lists)
    assert "2 training subjects lack a modality's file" in output
    masks = MissingnessTable.read(tmp_path / "split" / "missingness.csv", HEART).masks
    assert masks == {name: tuple(m in sequences[name] for m in HEART.names) for name in ids[:3]}

    checkpoint = train(tmp_path)
    log = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert np.isfinite(log["loss"]["total"])
    rates = json.loads((checkpoint / "card.json").read_text())["missing_rates"]
    assert rates == pytest.approx({"bssfp": 1 / 3, "lge": 1 / 3, "t2": 1 / 3}, abs=1e-3)

    options = ("--only", tmp_path / "split" / "test.txt", "--out", tmp_path / "scores", "--device", "cpu")
    run("evaluate", checkpoint, raw, *options)
    assert scores(tmp_path / "scores") == {
        "myops_training_104": {"bssfp", "lge", "t2", "bssfp+lge", "bssfp+t2", "lge+t2", "bssfp+lge+t2"},
        "myops_training_105": {"bssfp", "lge", "bssfp+lge"},
    }

    image = raw / "train25" / "myops_training_104_DE.nii.gz"
    run("predict", checkpoint, "--image", f"lge={image}", "-o", tmp_path / "mask.nii.gz", "--device", "cpu")
    mask = nib.load(tmp_path / "mask.nii.gz")
    assert mask.shape == HEART_SHAPE
    np.testing.assert_allclose(mask.affine, nib.load(image).affine)
    assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 200, 500, 600, 1220, 2221}
    assert mask.get_data_dtype() == np.uint16


@pytest.mark.slow
def test_an_nnunet_folder_with_a_missing_channel_from_raw_to_mask(tmp_path, one_thread):
    both, cases = ("T2", "ADC"), {}
    for number in range(4):
        cases[f"prostate_{number:02d}"] = both
    cases["prostate_01"] = ("T2",)
    cases["prostate_02"] = ("ADC",)
    raw = write_nnunet(tmp_path / "Dataset005_Prostate", cases)
    task = task_file(tmp_path, PROSTATE)
    output = run("prepare", raw, tmp_path / "prepared", "--task", task, "--workers", "1")
    assert "no file of adc in 1, t2 in 1" in output
    output = run("split", raw, "--task", task, "--out", tmp_path / "split", "--val", "0", "--test", "1", "--seed", "2")
    assert (tmp_path / "split" / "test.txt").read_text() == "prostate_03\n"
    masks = MissingnessTable.read(tmp_path / "split" / "missingness.csv", PROSTATE).masks
    assert masks == {"prostate_00": (True, True), "prostate_01": (True, False), "prostate_02": (False, True)}
    checkpoint = train(tmp_path, "none")
    run("evaluate", checkpoint, raw, "--out", tmp_path / "scores", "--device", "cpu")
    assert scores(tmp_path / "scores") == {
        "prostate_00": {"t2", "adc", "t2+adc"},
        "prostate_01": {"t2"},
        "prostate_02": {"adc"},
        "prostate_03": {"t2", "adc", "t2+adc"},
    }
    card = json.loads((checkpoint / "card.json").read_text())
    assert [s["modalities"] for s in card["scores"]["subsets"]] == [["t2"], ["adc"], ["t2", "adc"]]
    image = raw / "imagesTr" / "prostate_02_0001.nii.gz"
    run("predict", checkpoint, "--image", f"ADC={image}", "-o", tmp_path / "mask.nii.gz", "--device", "cpu")
    mask = nib.load(tmp_path / "mask.nii.gz")
    assert mask.get_data_dtype() == np.uint8
    assert mask.shape == nib.load(image).shape


def test_a_mask_of_a_heart_holds_2221_in_every_slice(tmp_path):
    import tiny_checkpoint

    folder = always(tiny_checkpoint.make(tmp_path / "heart", task=HEART), "scar")
    values, images = heart(0)
    nib.save(nib.Nifti1Image(images["lge"], short_axis(turned=True)), tmp_path / "x.nii.gz")
    run("predict", folder, "--image", f"lge={tmp_path / 'x.nii.gz'}", "-o", tmp_path / "mask.nii", "--device", "cpu")
    mask = nib.load(tmp_path / "mask.nii")
    assert (np.asarray(mask.dataobj) == 2221).all()
    assert mask.shape == values.shape
    assert json.loads(mask.header.extensions[0].get_content())["labels"]["2221"] == "scar"


def always(checkpoint: Path, label: str) -> Path:
    """The checkpoint with an output head that says `label` everywhere."""
    from models.checkpoint import save_checkpoint

    loaded = Checkpoint.load(checkpoint)
    head = loaded.network.decoder_fuse.seg_layer
    head.weight.data.zero_()
    head.bias.data.zero_()
    head.bias.data[[lab.name for lab in loaded.card.task.labels].index(label)] = 9
    save_checkpoint(checkpoint, loaded.card, loaded.network)
    return checkpoint


def test_gold_standards_in_a_folder_of_their_own(tmp_path):
    write_myops(tmp_path, "myops_training_101", 0)
    (tmp_path / "test20").mkdir()
    (tmp_path / "test20" / "myops_test_201_C0.nii.gz").touch()
    first, second = find_cases(tmp_path, HEART)
    assert [first.id, second.id] == ["myops_test_201", "myops_training_101"]
    assert "expected myops_test_201_gd.nii.gz" in first.problem
    assert second.problem is None
    assert list(second.images) == ["bssfp", "lge", "t2"]
    assert second.labels == tmp_path / "train25_myops_gd" / "myops_training_101_gd.nii.gz"
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "myops_training_101_seg.nii.gz").touch()
    assert "two folders" in find_cases(tmp_path, HEART)[1].problem


# nnU-Net's dataset.json


def layout(folder: Path, content: object, *files: str) -> Path:
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


TWO = {
    "channel_names": {"0": "T2", "1": "ADC"},
    "labels": {"background": 0, "PZ": 1, "TZ": 2},
    "file_ending": ".nii.gz",
}
ONE = {"modality": {"0": "T2", "1": "ADC"}, "labels": {"0": "background", "1": "PZ", "2": "TZ"}, "numTraining": 1}
FULL = ("imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz")


def problems(source: Path, task: Task = SHIPPED_PROSTATE) -> dict[str, str | None]:
    return {case.id: case.problem for case in find_cases(source, task)}


def test_cases_are_found_by_name(tmp_path):
    source = layout(
        *(tmp_path, TWO, *FULL),
        *("imagesTr/b_1_0001.nii.gz", "labelsTr/b_1.nii.gz"),
        *("imagesTr/no_labels_0000.nii.gz", "labelsTr/no_images.nii.gz", "labelsTr/._a.nii.gz"),
        *("imagesTr/many_0002.nii.gz", "labelsTr/many.nii.gz", "imagesTr/msd_01.nii.gz", "labelsTr/msd_01.nii.gz"),
        *("imagesTr/BRATS_0001.nii.gz", "labelsTr/BRATS_0001.nii.gz", "imagesTs/t_0000.nii.gz"),
    )
    cases = {case.id: case for case in find_cases(source, SHIPPED_PROSTATE)}
    assert list(cases["a"].images) == ["t2", "adc"]
    assert cases["a"].labels == source / "labelsTr" / "a.nii.gz"
    assert cases["b_1"].images == {"adc": source / "imagesTr" / "b_1_0001.nii.gz"}
    assert (cases["a"].problem, cases["b_1"].problem) == (None, None)
    told = {name: case.problem for name, case in cases.items() if case.problem}
    assert told.keys() == {"no_labels", "no_images", "many", "msd_01", "BRATS_0001"}
    assert "expected labelsTr/no_labels.nii.gz" in told["no_labels"]
    assert "no modality, only labels" in told["no_images"]
    assert "many_0002.nii.gz: dataset.json has no such channel; it numbers 0, 1" in told["many"]
    for name in ("msd_01", "BRATS_0001"):
        assert f"{name}.nii.gz has no channel number" in told[name]


def test_channels_are_in_the_tasks_order_and_under_its_aliases(tmp_path):
    task = GLIOMA.model_copy(update={"name": "x"})
    content = {"channel_names": {"0": "T2W", "1": "T1-Gd", "2": "FLAIR"}, "labels": {"background": 0}}
    source = layout(tmp_path, content, *(f"imagesTr/a_000{c}.nii.gz" for c in range(3)), "labelsTr/a.nii.gz")
    (case,) = find_cases(source, task)
    assert {name: path.name for name, path in case.images.items()} == {
        "flair": "a_0002.nii.gz",
        "t1ce": "a_0001.nii.gz",
        "t2": "a_0000.nii.gz",
    }
    assert list(case.images) == ["flair", "t1ce", "t2"]


def test_the_first_versions_list_of_cases(tmp_path):
    content = ONE | {
        "training": [
            {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"},
            {"image": "./imagesTr/b.nii.gz", "label": "./labelsTr/b.nii.gz"},
            {"image": "./imagesTr/msd.nii.gz", "label": "./labelsTr/msd.nii.gz"},
        ]
    }
    source = layout(
        *(tmp_path, content, *FULL, "imagesTr/b_0001.nii.gz", "labelsTr/b.nii.gz"),
        *("imagesTr/msd.nii.gz", "labelsTr/msd.nii.gz", "imagesTr/unlisted_0000.nii.gz", "labelsTr/unlisted.nii.gz"),
    )
    cases = {case.id: case for case in find_cases(source, SHIPPED_PROSTATE)}
    assert cases.keys() == {"a", "b", "msd"}
    assert list(cases["a"].images) == ["t2", "adc"]
    assert list(cases["b"].images) == ["adc"]
    assert "no channel number" in cases["msd"].problem
    assert [c.problem for c in cases.values()].count(None) == 2


def test_the_second_versions_mapping_of_cases(tmp_path):
    content = TWO | {
        "dataset": {
            "a": {"images": ["scans/a-t2.nii.gz", "scans/a-adc.nii.gz"], "label": "truth/a.nii.gz"},
            "b": {"images": [None, "scans/b-adc.nii.gz"], "label": "truth/b.nii.gz"},
            "c": {"images": ["scans/c-t2.nii.gz", "scans/gone.nii.gz"], "label": "truth/gone.nii.gz"},
        }
    }
    there = ("a-t2", "a-adc", "b-adc", "c-t2")
    source = layout(tmp_path, content, *(f"scans/{n}.nii.gz" for n in there), "truth/a.nii.gz", "truth/b.nii.gz")
    a, b, c = find_cases(source, SHIPPED_PROSTATE)
    assert a.images == {"t2": source / "scans" / "a-t2.nii.gz", "adc": source / "scans" / "a-adc.nii.gz"}
    assert a.labels == source / "truth" / "a.nii.gz"
    assert (list(b.images), b.problem) == (["adc"], None)
    assert list(c.images) == ["t2"]
    assert "no segmentation" in c.problem


def test_regions_for_labels_are_checked_and_read(tmp_path):
    glioma = {"channel_names": {"0": "T2"}}
    ours = glioma | {"labels": {"background": 0, "whole tumor": [1, 2, 3], "Tumour Core": [1, 3], "ET": 3}}
    source = layout(tmp_path / "ours", ours, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    assert problems(source, GLIOMA) == {"a": None}
    # nnU-Net's own conversion of BraTS swaps 1 and 2.
    theirs = glioma | {"labels": {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3]}}
    source = layout(tmp_path / "theirs", theirs, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    with pytest.raises(UserError, match=r"labels: tumor core is 2, 3 here and 1, 4 in task glioma"):
        find_cases(source, GLIOMA)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"channel_names": {"0": "T2", "1": "DWI"}},
            r"channel 1 \(DWI\) is no modality of task prostate: it has t2, adc",
        ),
        ({"channel_names": {"0": "T2", "1": "t2w"}}, "channels 0 and 1 are both t2"),
        ({"channel_names": ["T2", "ADC"]}, "channel_names is not as nnU-Net writes it"),
        ({"channel_names": {}}, "has no channel_names"),
        ({"channel_names": {"first": "T2"}}, "channel_names is not"),
        ({"labels": {"background": 0, "lesion": 3}}, r"lesion has the value 3, .* it reads \[0, 1, 2\]"),
        ({"labels": {"background": 0, "PZ": 2, "TZ": 1}}, "labels: PZ is 2 here and 1 in task prostate"),
        ({"labels": {"background": 0, "peripheral zone": 2}}, "peripheral zone is 2 here and 1"),
        ({"labels": {"background": None}}, "labels is not"),
        ({"file_ending": ".png"}, "file_ending '.png': only NIfTI"),
        ({"dataset": {"../a": {"images": ["x"], "label": "y"}}}, "'../a' is no name for a case"),
        ({"dataset": {"a": ["x", "y"]}}, "dataset is not as nnU-Net writes it"),
        ('{"channel_names"', "not valid JSON"),
        ("[]", "expected an object"),
    ],
)
def test_a_description_that_does_not_fit_is_told_in_one_line(tmp_path, change, said):
    source = layout(tmp_path, change if isinstance(change, str) else TWO | change, *FULL)
    with pytest.raises(UserError, match=said) as raised:
        find_cases(source, SHIPPED_PROSTATE)
    assert "dataset.json" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_list_of_the_first_version_that_is_none(tmp_path):
    source = layout(tmp_path, ONE | {"training": [{"image": "a.mha", "label": "a.mha"}]})
    with pytest.raises(UserError, match="training is not as nnU-Net writes it"):
        find_cases(source, SHIPPED_PROSTATE)


def test_a_folder_without_cases(tmp_path):
    with pytest.raises(UserError, match=r"no case found; expected imagesTr/<case>_0000.nii.gz"):
        find_cases(layout(tmp_path, TWO), SHIPPED_PROSTATE)


def test_a_prepared_data_set_is_not_taken_for_one(tmp_path):
    content = {"schema_version": 1, "task": PROSTATE.model_dump(mode="json"), "cases": []}
    source = layout(tmp_path, content, "x_t2.nii.gz", "x_seg.nii.gz")
    assert problems(source) == {"x": None}
