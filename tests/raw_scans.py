"""Small phantom scans for the tests of raw input: a patient at 4 mm, moved and with a skull where asked for."""

from functools import cache

from benchmarks.heads import Motion, scanned, volumes_of, with_skull
from training.phantom import make_subject

MOVED = Motion((6.0, -4.0, 8.0), (7.0, -9.0, 5.0))


@cache
def patient(index=1):
    """Stripped scans on one grid of 60 x 60 x 45 voxels of 4 mm, with room for a skull."""
    return volumes_of(make_subject(5, index, shape=(60, 60, 45), spacing=4.0))


@cache
def skulled(name):
    return with_skull(name, patient()[name])


@cache
def moved(name):
    """A scan of its own: the patient moved, thicker slices."""
    return scanned(patient()[name], MOVED, (4.0, 4.0, 5.0))
