"""What kind of scans they are is told from the scans alone."""

from dataclasses import replace

import numpy as np
import pytest
from raw_scans import moved, patient, skulled

from benchmarks.heads import Motion, scanned
from models.raw.look import Look, aligned, doubts, is_brain, refuse_labels
from models.task import Task
from models.volume import VolumeError

CONTRASTS = ("flair", "t1ce", "t1", "t2")


@pytest.mark.parametrize("name", CONTRASTS)
def test_a_stripped_brain_and_a_head_are_told_apart(name):
    assert not Look.at(patient()[name]).head
    assert Look.at(skulled(name)).head


@pytest.mark.parametrize("name", CONTRASTS)
def test_a_skull_in_air_that_was_set_to_nothing_is_seen_by_its_bone(name):
    head = skulled(name)
    cut = replace(head, data=np.where(Look.at(head).bright, head.data, np.float32(0)))
    assert Look.at(cut).head
    assert not Look.at(replace(cut, data=np.where(patient()[name].data > 0, cut.data, np.float32(0)))).head


def test_scans_that_moved_are_not_aligned():
    scans = patient()
    small = scanned(scans["t2"], Motion(mm=(2.5, 0.0, 0.0)), (4.0, 4.0, 4.0))
    still = scanned(scans["t2"], Motion(), (4.0, 4.0, 5.0))
    looks = {"t1": Look.at(scans["t1"])}
    assert aligned(looks | {n: Look.at(scans[n]) for n in ("flair", "t2", "t1ce")}, "t1")
    assert aligned(looks | {"t2": Look.at(still)}, "t1")
    assert not aligned(looks | {"t2": Look.at(small)}, "t1")
    assert not aligned(looks | {"t2": Look.at(moved("t2"))}, "t1")


def test_contrasts_that_were_swapped_are_told():
    scans = patient()
    assert doubts({name: Look.at(scan) for name, scan in scans.items()}, "t1") == []
    swapped = doubts({"t1": Look.at(scans["t2"]), "t2": Look.at(scans["t1"])}, "t1")
    assert [text.split(":")[0] for text in swapped] == ["t1", "t2"]
    assert "was another scan given as it?" in swapped[0]


def test_a_brain_elsewhere_is_doubted():
    far = scanned(patient()["t2"], Motion((0.0, 20.0, 0.0), (12.0, -12.0, 0.0)), (4.0, 4.0, 4.0))
    looks = {"t1": Look.at(patient()["t1"]), "t2": Look.at(far)}
    (text,) = doubts(looks, "t1")
    assert text.startswith("t2: the brain's outline is not that of t1")


def test_a_mask_is_no_scan():
    scan = patient()["t2"]
    mask = replace(scan, data=np.digitize(scan.data, [1, 200, 400]).astype(np.float32))
    with pytest.raises(VolumeError, match="t2: the image has 4 values, all whole numbers: this is a mask"):
        refuse_labels({"t1": scan, "t2": mask})


def test_raw_is_for_the_brain_alone():
    assert is_brain(Task.load("glioma"))
    assert not is_brain(Task.load("prostate"))
    assert not is_brain(Task.load("myops2020"))
