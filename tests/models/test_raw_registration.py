"""Registration finds a motion that is known, and says so when there is none to be found."""

from dataclasses import replace

import numpy as np
import pytest
from raw_scans import MOVED, moved, patient, skulled

from benchmarks.heads import Motion, scanned
from benchmarks.raw import error_mm
from models.raw.coarse import Coarse
from models.raw.itk import alone
from models.raw.registration import _optimise, register
from models.volume import VolumeError


@pytest.fixture(scope="module")
def found():
    return register(patient()["t1"], moved("flair"), "flair", "t1")


def test_a_known_motion_is_found(found):
    fixed = patient()["t1"]
    assert error_mm(found.matrix, MOVED.matrix(fixed.grid), fixed) < 1.0
    assert found.similarity > found.before
    assert found.overlap > 0.95
    assert found.apart_mm < 2.5


def test_it_is_the_same_every_time():
    rough = Coarse.of(patient()["t1"], 8.0), Coarse.of(moved("flair"), 8.0)
    results = []
    for _ in range(2):
        with alone():
            results.append(_optimise(*rough, np.eye(4), levels=2)[0])
    np.testing.assert_array_equal(*results)
    assert (results[0] != np.eye(4)).any()


def test_a_head_with_its_skull_is_found_too():
    fixed = skulled("t1")
    motion = Motion((3.0, -2.0, 5.0), (4.0, 6.0, -3.0))
    result = register(fixed, scanned(skulled("t2"), motion, (4.0, 4.0, 4.0)), "t2", "t1")
    assert error_mm(result.matrix, motion.matrix(fixed.grid), patient()["t1"]) < 1.0


def strangers():
    t1 = patient()["t1"]
    rng = np.random.default_rng(1)
    noise = replace(t1, data=rng.rayleigh(100, t1.data.shape).astype(np.float32))
    i, j, k = np.ogrid[:60, :60, :45]
    bone = ((i - 30) ** 2 + (j - 30) ** 2 < 36) * 300.0
    leg = ((i - 30) ** 2 + (j - 30) ** 2 < 225) * (600.0 + 40 * rng.standard_normal(t1.data.shape)) - bone + 0 * k
    return {"noise": noise, "a leg": replace(t1, data=leg.astype(np.float32))}


@pytest.mark.parametrize("what", ["noise", "a leg"])
def test_what_shows_no_such_head_is_refused(what):
    with pytest.raises(VolumeError, match="t2: could not be registered to t1") as refusal:
        register(patient()["t1"], strangers()[what], "t2", "t1")
    assert "leave it out" in str(refusal.value)


def test_a_motion_beyond_reason_is_refused():
    far = scanned(patient()["flair"], Motion(mm=(70.0, 0.0, 0.0)), (4.0, 4.0, 4.0), margin=45.0)
    with pytest.raises(VolumeError, match="flair: could not be registered to t1: it would have to move by 70 mm"):
        register(patient()["t1"], far, "flair", "t1")
