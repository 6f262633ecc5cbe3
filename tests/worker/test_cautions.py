"""Each warning when it is due, and not when it is not."""

import nibabel as nib
import numpy as np
import pytest
from scans import head, image

from app.jobs.record import Expectation, InputFile, Job
from models.task import Task
from models.volume import Grid, Volume
from worker.cautions import Facts, cautions

GLIOMA = Task.load("glioma")


def sent(dice=0.9, given=("flair",)):
    return Job(
        id="a",
        model="m",
        inputs=tuple(InputFile(modality=name, filename=f"{name}.nii.gz") for name in given),
        missing=tuple(name for name in GLIOMA.names if name not in given),
        expected=Expectation(dataset="d", cases=3, dice={"WT": dice, "TC": 0.1, "ET": None}),
    )


def facts(data=None, zooms=(1, 1, 1), task=GLIOMA, axes="RAS"):
    affine = np.diag([*zooms, 1.0])
    turned = nib.Nifti1Image(np.zeros((2, 3, 4)), affine).as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    )
    grid = Grid.of(image(np.zeros((2, 3, 4), np.float32), turned.affine))
    return Facts.of(Volume(head("flair") if data is None else data, grid), task)


def said(job=None, task=GLIOMA, empty=False, **of):
    return list(cautions(job or sent(), task, of or {"flair": facts()}, empty))


def test_nothing_is_said_of_a_good_job():
    assert said() == []


def test_an_empty_mask():
    (text,) = said(empty=True)
    assert text.startswith("The mask is empty")


@pytest.mark.parametrize(("zooms", "coarse"), [((2, 2, 2), False), ((1, 1, 2.1), True), ((3, 1, 1), True)])
def test_coarse_images(zooms, coarse):
    texts = said(t1=facts(), flair=facts(zooms=zooms))
    assert ["flair has voxels of" in t for t in texts] == [True] * coarse
    if coarse:
        assert "2 times the model's 1 x 1 x 1 mm" in texts[0]


def test_spacing_is_compared_along_the_tasks_own_axes():
    thick = Task.model_validate(GLIOMA.model_dump() | {"spacing": (1.0, 1.0, 3.0)})
    assert said(task=thick, flair=facts(zooms=(1, 1, 4), task=thick)) == []
    assert said(task=thick, flair=facts(zooms=(1, 1, 4), task=thick, axes="SRA")) == []
    assert said(task=thick, flair=facts(zooms=(4, 1, 1), task=thick))
    stored = Task.model_validate(thick.model_dump() | {"orientation": "stored"})
    assert said(task=stored, flair=facts(zooms=(1, 1, 4), task=stored, axes="SRA"))


def test_saturated_images():
    data = head("flair")
    assert said(flair=facts(data)) == []
    bright = np.sort(data[data > 0])[-int(0.03 * (data > 0).sum())]
    (text,) = said(flair=facts(np.minimum(data, bright)))
    assert text.startswith("flair is saturated, with 3%")
    nothing_above_the_background = np.where(data > 0, data - 1000, 0).astype(np.float32)
    assert said(flair=facts(nothing_above_the_background)) == []


@pytest.mark.parametrize(
    ("dice", "given", "begins"),
    [
        (0.7, ("flair",), None),
        (0.69, ("flair", "t1"), "On its test set the model reached a Dice of only 0.69 for WT from flair + t1"),
        (None, ("flair",), "How well the model finds WT from flair was never measured"),
    ],
)
def test_modalities_with_which_little_is_to_be_expected(dice, given, begins):
    texts = said(sent(dice, given))
    assert [t.startswith(begins) for t in texts] == [True] * bool(begins)
    if begins:
        assert texts[0].endswith(f"send more of {', '.join(n for n in GLIOMA.names if n not in given)}.")


def test_a_model_without_scores():
    (text,) = said(sent(given=GLIOMA.names).model_copy(update={"expected": None}))
    assert text.endswith("was never measured: check the mask against the images.")


def test_the_region_of_most_labels_is_what_counts():
    heart = Task.load("myops2020")
    (text,) = said(task=heart, empty=False)
    assert "finds myocardium from" in text


def test_sentences():
    """One each, without a line break."""
    coarse = np.minimum(head("flair"), 100)
    texts = said(sent(0.1), empty=True, flair=facts(coarse, zooms=(5, 1, 1)))
    assert len(texts) == 4
    assert all(text.endswith(".") and ". " not in text and "\n" not in text for text in texts)
