"""The skull: recognised, warned of, stripped where deepbet is there, and refused with a remedy where it is not."""

import sys

import numpy as np
import pytest
from raw_scans import patient, skulled

from models.raw import skull
from models.raw.prepare import prepare
from models.raw.skull import NoStripperError, brain_of, brought
from models.task import Task
from training.metrics import dice

TASK = Task.load("glioma-4mm")


def silent(_stage, _fraction):
    pass


def test_a_skull_where_none_was_promised_is_warned_of():
    prepared = prepare({"t1": skulled("t1")}, TASK, "none", silent)
    assert prepared.volumes["t1"] is skulled("t1")
    assert prepared.warnings[0].startswith("t1: the skull seems to be there")


def test_without_a_stripper_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepbet", None)
    skull._deepbet.cache_clear()
    with pytest.raises(NoStripperError, match=r"pip install 'passion-seg\[strip\]'"):
        prepare({"t1": skulled("t1")}, TASK, "raw", silent)
    assert prepare({"t1": patient()["t1"]}, TASK, "raw", silent).warnings == ()


def test_other_weights_are_never_loaded(monkeypatch, tmp_path):
    package = tmp_path / "deepbet"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "data" / "models").mkdir(parents=True)
    for name in skull.WEIGHTS:
        (tmp_path / "data" / "models" / name).write_bytes(b"a stranger's")
    monkeypatch.delitem(sys.modules, "deepbet", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    skull._deepbet.cache_clear()
    with pytest.raises(NoStripperError, match="is not what deepbet"):
        brain_of("t1", skulled("t1"))


@pytest.mark.slow
def test_the_brain_is_found_in_a_head():
    skull._deepbet.cache_clear()
    found = brain_of("t1", skulled("t1"))
    assert dice(found, patient()["t1"].data > 0) > 0.85


def test_a_brain_comes_to_another_grid():
    t1 = patient()["t1"]
    brain = t1.data > 0
    np.testing.assert_array_equal(brought(brain, t1.grid, t1.grid), brain)
