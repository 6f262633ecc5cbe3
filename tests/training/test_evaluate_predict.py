"""`passion evaluate` and `passion predict`, as a user runs them."""

import csv
import json
import shutil

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
from dicom_scans import dicom, lps, ras, series, zipped
from scans import head
from typer.testing import CliRunner

from app.jobs.cards import ModelShelf
from models.checkpoint import Checkpoint, load_card, save_card
from models.predictor import Predictor
from models.task import Task
from training.cli import app
from training.errors import UserError
from training.evaluation import evaluate, scored_names
from training.metrics import dice
from training.prepare import find_cases

RUNNER = CliRunner()


def run(*arguments):
    return RUNNER.invoke(app, [str(a) for a in arguments])


@pytest.fixture
def checkpoint(small_checkpoint, tmp_path):
    return shutil.copytree(small_checkpoint, tmp_path / "model")


@pytest.fixture(scope="session")
def case(small_phantoms):
    return min(small_phantoms.iterdir())


def scan(case, modality):
    return case / f"{case.name}_{modality}.nii.gz"


@pytest.mark.slow
def test_evaluate_scores_every_subset_as_predict_would(checkpoint, small_phantoms, case, tmp_path):
    (tmp_path / "test.txt").write_text(f"{case.name}\n")
    out = tmp_path / "scores"
    result = run(
        "evaluate", checkpoint, small_phantoms, "--only", tmp_path / "test.txt", "--out", out, "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert len(rows) == 15 * 3
    assert (out / "dice.png").read_bytes().startswith(b"\x89PNG")

    card = json.loads((checkpoint / "card.json").read_text())
    assert card["scores"]["cases"] == 1
    assert len(card["scores"]["subsets"]) == 15
    predictor = Predictor(Checkpoint.load(checkpoint))
    truth = np.asarray(nib.load(scan(case, "seg")).dataobj)
    for subset in (("flair", "t2"), ("t1",)):
        mask = np.asarray(predictor.segment({m: scan(case, m) for m in subset}).mask.dataobj)
        want = dice(mask > 0, truth > 0)
        row = next(r for r in rows if r["modalities"] == "+".join(subset) and r["region"] == "WT")
        assert float(row["dice"]) == pytest.approx(want, abs=1e-6)
        assert float(row["truth_ml"]) == pytest.approx((truth > 0).sum() * 0.216, rel=1e-5)
        score = next(s for s in card["scores"]["subsets"] if s["modalities"] == list(subset))
        assert score["dice"]["WT"] == pytest.approx(want, abs=1e-4)


def test_predict_takes_dicom_series_and_writes_dicom_seg(checkpoint, tmp_path):
    affine, data = lps(spacing=(6.0, 6.0, 6.0)), head("flair", (24, 22, 20)).astype(np.uint16)
    folder, file = tmp_path / "flair", tmp_path / "t2.zip"
    folder.mkdir()
    for k, dataset in enumerate(series(data, affine)):
        (folder / str(k)).write_bytes(dicom(dataset))
    file.write_bytes(zipped(series(data, affine, name="t2")))
    out, seg_file = tmp_path / "mask.nii.gz", tmp_path / "mask.dcm"
    scans = ("--flair", folder, "--t2", file, "-o", out, "--device", "cpu")
    result = run("predict", checkpoint, *scans, "--dicom-seg", seg_file)
    assert result.exit_code == 0, result.output
    mask = nib.load(out)
    np.testing.assert_allclose(mask.affine, ras(affine), atol=1e-4)
    seg = hd.seg.segread(seg_file)
    voxels = sum(int((seg.get_volume(segment_numbers=[n]).array > 0).sum()) for n in seg.segment_numbers)
    assert voxels == np.count_nonzero(np.asarray(mask.dataobj)) > 0

    file.write_bytes(zipped(series(data, affine, name="t2", patient="5")))
    out.unlink()
    for options, message in (((), "of 2 patients"), (("--dicom-seg", tmp_path / "mask.nii"), "in .dcm")):
        result = run("predict", checkpoint, *scans, *options)
        assert isinstance(result.exception, UserError)
        assert message in str(result.exception)
        assert "DOE" not in str(result.exception)
        assert not out.exists()


@pytest.mark.parametrize("options", [("--no-card",), ("--overlap", 0.25), ("--window", 24)])
def test_evaluate_one_subset_without_touching_the_card(checkpoint, small_phantoms, case, tmp_path, options):
    before = (checkpoint / "card.json").read_bytes()
    (tmp_path / "test.txt").write_text(f"{case.name}\n")
    arguments = ("--only", tmp_path / "test.txt", "--modalities", "t2w+flair", "--empty", "brats")
    arguments += ("--out", tmp_path / "o")
    result = run("evaluate", checkpoint, small_phantoms, *arguments, *options)
    assert result.exit_code == 0, result.output
    assert (checkpoint / "card.json").read_bytes() == before
    assert {r["modalities"] for r in csv.DictReader((tmp_path / "o" / "scores.csv").open())} == {"flair+t2"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--empty", "maybe"), "published, brats, nan"),
        (("--modalities", "dwi"), "no modality"),
        (("--only", "/nowhere.txt"), "cannot read the list"),
        (("--out", "/dev/null/scores"), "cannot make the folder"),
    ],
)
def test_evaluate_refuses_what_it_cannot_do(checkpoint, small_phantoms, arguments, message):
    result = run("evaluate", checkpoint, small_phantoms, *arguments)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)


def evaluate_with(checkpoint, case, tmp_path, min_ml, *arguments):
    """Scores of one case from FLAIR alone, ET having a least volume: rows by region, and what was printed."""
    card = load_card(checkpoint)
    *others, et = card.task.regions
    regions = (*others, et.model_copy(update={"min_ml": min_ml}))
    save_card(checkpoint, card.model_copy(update={"task": card.task.model_copy(update={"regions": regions})}))
    (tmp_path / "one.txt").write_text(case.name)
    options = ("--only", tmp_path / "one.txt", "--modalities", "flair", "--out", tmp_path / "o", *arguments)
    result = run("evaluate", checkpoint, case.parent, *options)
    assert result.exit_code == 0, result.output
    return {r["region"]: r for r in csv.DictReader((tmp_path / "o" / "scores.csv").open())}, result.output


def test_a_region_with_a_least_volume_is_scored_twice(checkpoint, case, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    rows, _ = evaluate_with(checkpoint, case, tmp_path, 0.001)
    assert list(rows) == ["WT", "TC", "ET", "ET_pp"]
    found = float(rows["ET"]["predicted_ml"])
    assert found > 0, "the network must find something for the test to mean anything"
    assert rows["ET_pp"] == rows["ET"] | {"region": "ET_pp"}

    assert evaluate_with(checkpoint, case, tmp_path, found)[0]["ET_pp"] == rows["ET_pp"]
    rows, printed = evaluate_with(checkpoint, case, tmp_path, found * 1.01, "--empty", "brats")
    assert float(rows["ET"]["predicted_ml"]) == found
    dropped = rows["ET_pp"]
    assert (float(dropped["predicted_ml"]), float(dropped["dice"]), float(dropped["hd95_mm"])) == (0, 0, 373.13)
    assert dropped["truth_ml"] == rows["ET"]["truth_ml"] != "0"
    assert "Dice ET_pp" in printed
    assert "HD95 ET_pp" in printed


def test_the_service_reads_a_card_with_a_postprocessed_region(checkpoint, case, tmp_path):
    evaluate_with(checkpoint, case, tmp_path, 1e6)
    (score,) = load_card(checkpoint).scores.subsets
    assert score.dice["ET_pp"] == 0
    assert score.hd95["ET_pp"] is None
    card = ModelShelf(checkpoint.parent).get(checkpoint.name)
    assert card.scores.subsets[0].dice == score.dice
    # A job's mask is not post-processed, so what is expected of it is not either.
    assert set(card.expectation(("flair",)).dice) == {"WT", "TC", "ET"}


def test_a_region_may_not_have_the_name_of_another_ones_postprocessed_form():
    task = Task.load("glioma")
    named = [r.model_copy(update={"name": "ET_pp"} if r.name == "WT" else {}) for r in task.regions]
    with pytest.raises(UserError, match="ET_pp is taken"):
        scored_names(task.model_copy(update={"regions": tuple(named)}))


def test_the_published_volume_of_et_is_500_voxels():
    for name in ("glioma", "glioma-4mm"):
        task = Task.load(name)
        assert {r.name: r.min_ml for r in task.regions} == {"WT": 0, "TC": 0, "ET": 0.5}
        assert scored_names(task) == ["WT", "TC", "ET", "ET_pp"]


def test_a_case_without_labels_is_named_before_any_is_segmented(checkpoint, small_phantoms, tmp_path):
    *_, last = sorted(shutil.copytree(small_phantoms, tmp_path / "cases").iterdir())
    scan(last, "seg").unlink()
    predictor, done = Predictor(Checkpoint.load(checkpoint)), []
    cases = find_cases(tmp_path / "cases", predictor.task)
    with pytest.raises(UserError, match=rf"^{last.name}: no segmentation.*--only"):
        evaluate(predictor, cases, [("flair",)], "published", lambda: done.append(1))
    assert not done


@pytest.mark.parametrize(
    ("what", "voxel", "message"), [("seg", 7, "label values [7.0] are not of task"), ("flair", np.nan, "NaN")]
)
def test_a_bad_voxel_is_told_in_one_line(checkpoint, case, tmp_path, what, voxel, message):
    folder = shutil.copytree(case, tmp_path / "cases" / case.name)
    image = nib.load(scan(folder, what))
    data = image.get_fdata()
    data[5, 5, 5] = voxel
    nib.save(nib.Nifti1Image(data, image.affine), scan(folder, what))
    result = run("evaluate", checkpoint, tmp_path / "cases", "--out", tmp_path / "o")
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(f"{scan(folder, what)}: ")
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_labels_on_another_grid_are_refused(checkpoint, case, tmp_path):
    folder = shutil.copytree(case, tmp_path / "cases" / case.name)
    labels = nib.load(scan(folder, "seg"))
    moved = labels.affine.copy()
    moved[0, 3] += 1
    nib.save(nib.Nifti1Image(np.asarray(labels.dataobj), moved), scan(folder, "seg"))
    result = run("evaluate", checkpoint, tmp_path / "cases", "--out", tmp_path / "o")
    assert "its labels lie on another grid than flair" in str(result.exception)


def test_predict_puts_the_mask_on_the_grid_of_the_first_scan_given(checkpoint, case, tmp_path):
    flair = nib.load(scan(case, "flair"))
    flipped = nib.Nifti1Image(np.asarray(flair.dataobj)[::-1], flair.affine @ np.diag([-1.0, 1, 1, 1]))
    flipped.affine[:3, 3] = (flair.affine @ [flair.shape[0] - 1, 0, 0, 1])[:3]
    flipped = nib.Nifti1Image(flipped.dataobj, flipped.affine)
    nib.save(flipped, tmp_path / "flipped.nii")
    masks = []
    for order in (
        ("--t2", scan(case, "t2"), "--flair", tmp_path / "flipped.nii"),
        ("--flair", tmp_path / "flipped.nii", "--t2", scan(case, "t2")),
    ):
        output = tmp_path / f"{order[0].strip('-')}.nii.gz"
        result = run("predict", checkpoint, *order, "-o", output)
        assert result.exit_code == 0, result.output
        assert "mL" in result.output
        masks.append(nib.load(output))
    np.testing.assert_allclose(masks[0].affine, flair.affine)
    np.testing.assert_allclose(masks[1].affine, flipped.affine)
    np.testing.assert_array_equal(np.asarray(masks[0].dataobj), np.asarray(masks[1].dataobj)[::-1])


def test_predict_takes_any_name_of_any_model(checkpoint, case, tmp_path):
    result = run("predict", checkpoint, "--image", f"t1c={scan(case, 't1ce')}", "-o", tmp_path / "m.nii")
    assert result.exit_code == 0, result.output
    assert nib.load(tmp_path / "m.nii").shape == (40, 40, 26)


def test_an_empty_mask_is_said_aloud(checkpoint, case, tmp_path):
    from models.checkpoint import save_checkpoint

    loaded = Checkpoint.load(checkpoint)
    loaded.network.decoder_fuse.seg_layer.bias.data = loaded.network.decoder_fuse.seg_layer.bias.data * 0
    loaded.network.decoder_fuse.seg_layer.weight.data *= 0
    loaded.network.decoder_fuse.seg_layer.bias.data[0] = 5
    save_checkpoint(checkpoint, loaded.card, loaded.network)
    result = run("predict", checkpoint, "--t1", scan(case, "t1"), "-o", tmp_path / "m.nii.gz")
    assert result.exit_code == 0
    assert "the mask is empty" in result.output
    assert not np.asarray(nib.load(tmp_path / "m.nii.gz").dataobj).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "mask.nii.gz"), "no scan given"),
        (("--t1", "none.nii.gz", "-o", "mask.nii.gz"), "t1: none.nii.gz does not exist"),
        (("--t1", "x.nii", "-o", "mask.png"), r"end the mask's name in .nii.gz"),
        (("--t1", "x.nii", "-o", "no/such/mask.nii"), "is no folder"),
        (("--image", "t1", "-o", "mask.nii"), "NAME=FILE"),
        (("--image", "dwi=x.nii", "-o", "mask.nii"), "no modality"),
        (("--t1", "x.nii", "--image", "t1=y.nii", "-o", "mask.nii"), "given twice"),
    ],
)
def test_predict_refuses_in_one_line_and_writes_nothing(checkpoint, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    result = run("predict", checkpoint, *arguments)
    assert isinstance(result.exception, UserError), result.output
    assert message in str(result.exception)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_predict_takes_its_windows_from_the_command_line(checkpoint, case, tmp_path):
    given = ("predict", checkpoint, "--t1", scan(case, "t1"), "-o", tmp_path / "m.nii.gz")
    for options in (("--fast",), ("--overlap", 0, "--window", "24x16x16")):
        result = run(*given, *options)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fast", "--overlap", 0.5), "--fast is --overlap 0.25: give one of the two"),
        (("--window", "16x16"), "--window 16x16: write voxels along each axis, such as 96 or 96x96x64"),
        (("--window", "20"), "a window of 20 x 20 x 20 voxels does not fit rfnet"),
        (("--overlap", 1), "an overlap of 1 cannot be had"),
        (("--precision", "half"), "precision 'half' is unknown: use float32 or bfloat16"),
    ],
)
def test_windows_that_cannot_be_had_are_refused(checkpoint, case, tmp_path, options, message):
    result = run("predict", checkpoint, "--t1", scan(case, "t1"), "-o", tmp_path / "m.nii.gz", *options)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert not (tmp_path / "m.nii.gz").exists()
