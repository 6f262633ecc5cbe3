"""What schemathesis cannot make up: files of images. It reads this file by itself, in a process of its own."""

import sys
from pathlib import Path

import schemathesis
from hypothesis import strategies as st
from schemathesis.openapi.checks import UseAfterFree

sys.path.insert(0, str(Path(__file__).parents[2]))
from scans import head, image, nifti, nifti_gz

SIDE = 12
"""Voxels along each axis: less than the model's patch, so that a job is one window."""


def volume(seed):
    return image(head("flair", (SIDE,) * 3, seed))


def files(encode):
    """One of eight is junk. Of the others there are few, so that an Idempotency-Key may meet its own request again."""
    junk = st.binary(max_size=64)
    good = st.integers(0, 3).map(lambda seed: encode(volume(seed)))
    return st.integers(0, 7).flatmap(lambda one: good if one else junk)


schemathesis.openapi.media_type("application/gzip", files(nifti_gz))
schemathesis.openapi.media_type("application/octet-stream", files(nifti))


@schemathesis.hook
def filter_failure(context, failure, case, response):
    """A job that was stopped stays readable as `cancelled` for a while, and says so: it is deleted, and not gone."""
    return not (isinstance(failure, UseAfterFree) and b'"state":"cancelled"' in response.content)
