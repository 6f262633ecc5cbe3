"""Uploads that will not do: each has its status, its problem document, and nothing of it stays on the store."""

import gzip
import io
import socket
import time
import zipfile
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import psutil
import pytest
from isal import igzip
from live_stack import running_stack
from scans import UNIT, edited, head, image, nifti, nifti_gz, scan

from benchmarks.parts import until

GOOD = scan()
NII = nifti(image(head("flair")))
ELSEWHERE = np.diag([1.0, 1, 1, 1])
ELSEWHERE[:3, 3] = 500


def nan():
    data = head("flair")
    data[3, 3, 3] = np.nan
    return nifti_gz(image(data))


def rgb():
    dtype = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    return nifti(nib.Nifti1Image(np.ones((16, 16, 16), dtype), UNIT))


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("scan.nii", NII)
    return file.getvalue()


# name: (parts, status, kind of problem, field at fault)
FILES = {
    "no file at all": ([], 422, "no-images", None),
    "an empty file": ([("flair", b"")], 422, "empty-file", "flair"),
    "text": ([("flair", b"these are no voxels")], 415, "not-nifti", "flair"),
    "a picture": ([("t1", b"\x89PNG\r\n\x1a\n" + bytes(500))], 415, "not-nifti", "t1"),
    "a DICOM file": ([("t1", bytes(128) + b"DICM" + bytes(500))], 415, "not-nifti", "t1"),
    "a zip file": ([("t1", zipped())], 415, "not-dicom", "t1"),
    "three bytes": ([("t1", NII[:3])], 415, "not-nifti", "t1"),
    "a header alone": ([("t1", NII[:348])], 422, "truncated", "t1"),
    "gzip in gzip": ([("t1", gzip.compress(GOOD))], 415, "not-nifti", "t1"),
    "an extension that lies": (
        [("t1", edited(NII[:348] + b"\1" + b"\xff" * 67 + NII[352:], vox_offset=416))],
        422,
        "bad-header",
        "t1",
    ),
    "gzipped text": ([("t1", gzip.compress(b"no voxels here " * 50))], 415, "not-nifti", "t1"),
    "half of a pair": ([("t2", edited(NII, magic=b"ni1\0"))], 415, "two-files", "t2"),
    "an Analyze file": ([("t2", edited(NII, magic=bytes(4)))], 415, "not-nifti", "t2"),
    "gzip cut off": ([("flair", GOOD[:-5000])], 422, "truncated", "flair"),
    "voxels cut off": ([("flair", NII[:-5000])], 422, "truncated", "flair"),
    "damaged gzip": ([("flair", GOOD[:10] + b"\xff" * 50 + GOOD[60:])], 422, "corrupt-gzip", "flair"),
    "wrong check sum": ([("flair", GOOD[:-8] + bytes(8))], 422, "corrupt-gzip", "flair"),
    "a gzip bomb": ([("flair", gzip.compress(NII + bytes(80 << 20)))], 413, "too-large-uncompressed", "flair"),
    "a file that is too large": ([("flair", GOOD + bytes(5 << 20))], 413, "too-large", "flair"),
    "a request that is too large": (
        [(name, GOOD + bytes(3 << 20)) for name in ("flair", "t1", "t2")],
        413,
        "too-large",
        None,
    ),
    "terabytes by the header": (
        [("flair", edited(NII, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]))],
        413,
        "too-many-voxels",
        "flair",
    ),
    "negative dimensions": ([("flair", edited(NII, dim=[3, -1, 40, 32, 1, 1, 1, 1]))], 422, "bad-header", "flair"),
    "voxels past the end": ([("flair", edited(NII, vox_offset=9e6))], 422, "truncated", "flair"),
    "a series": ([("t1", nifti(image(np.stack([head("t1")] * 3, -1))))], 422, "not-3d", "t1"),
    "a slice": ([("t1", nifti(image(head("t1")[:, :, :1])))], 422, "too-few-voxels", "t1"),
    "colours": ([("t1", rgb())], 422, "bad-data-type", "t1"),
    "complex numbers": ([("t1", nifti(image(head("t1").astype("c8"))))], 422, "bad-data-type", "t1"),
    "NaN": ([("t1", nan())], 422, "not-finite", "t1"),
    "NaN in the affine": ([("t1", edited(NII, srow_x=[np.nan, 0, 0, 0]))], 422, "bad-affine", "t1"),
    "an affine without volume": (
        [("t1", edited(NII, srow_x=[1, 1, 0, 0], srow_y=[0, 0.001, 0, 0]))],
        422,
        "bad-affine",
        "t1",
    ),
    "voxels of half a metre": ([("t1", nifti(image(head("t1"), np.diag([500.0, 1, 1, 1]))))], 422, "bad-spacing", "t1"),
    "only zeros": ([("t1", nifti_gz(image(np.zeros((40, 40, 32), "i2"))))], 422, "empty-image", "t1"),
    "a knee beside a head": (
        [("flair", GOOD), ("t1", scan("t1", affine=ELSEWHERE))],
        422,
        "different-field-of-view",
        "t1",
    ),
    "a field that is no modality": ([("flair", GOOD), ("dwi", GOOD)], 422, "unknown-field", "dwi"),
    "a modality twice": ([("t1", GOOD), ("t1", GOOD)], 422, "duplicate-modality", "t1"),
    "a modality and its alias": ([("t1ce", GOOD), ("t1c", GOOD)], 422, "duplicate-modality", "t1c"),
    "the second of two is bad": ([("flair", GOOD), ("t2", b"nothing")], 415, "not-nifti", "t2"),
}


@pytest.fixture(scope="module")
def strict(tmp_path_factory, models):
    """A stack with small limits, so that what is too large can be small."""
    limits = {
        "PASSION_MAX_FILE_BYTES": str(4 << 20),
        "PASSION_MAX_REQUEST_BYTES": str(8 << 20),
        "PASSION_MAX_UNCOMPRESSED_BYTES": str(32 << 20),
    }
    with running_stack(tmp_path_factory.mktemp("strict"), models, **limits) as stack:
        yield stack


def assert_refused(stack, response, status, kind, field):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert document["type"] == f"/problems/{kind}"
    assert document["status"] == status
    assert document.get("field") == field
    assert document["title"]
    assert document["detail"]
    assert document["remedy"]
    assert "Traceback" not in response.text
    assert str(stack.store) not in response.text
    assert stack.on_store() == []


@pytest.mark.parametrize("name", FILES)
def test_a_bad_upload(strict, name):
    parts, status, kind, field = FILES[name]
    files = [(field_name, ("scan.nii.gz", data)) for field_name, data in parts]
    files.append(("model", (None, "tiny")))
    response = strict.http.post("/segment", files=files)
    assert_refused(strict, response, status, kind, field)


def peak(stack):
    """Bytes of the API's process when it had most. Linux tells it in kB."""
    (api,) = [p for p in psutil.Process(stack.process.pid).children() if {"app.cli", "api"} <= set(p.cmdline())]
    (line,) = [w for w in Path(f"/proc/{api.pid}/status").read_text().splitlines() if w.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def test_a_bomb_of_a_gigabyte_takes_no_memory(strict):
    """1 GiB of zeros is 1 MB as sent, in 257 gzip members; the API grows by some chunks, not by the limit."""
    bomb = gzip.compress(NII) + igzip.compress(bytes(4 << 20)) * 256
    assert len(bomb) < 4 << 20
    before = peak(strict)
    response = strict.http.post("/segment", files={"flair": ("a", bomb)})
    assert_refused(strict, response, 413, "too-large-uncompressed", "flair")
    assert peak(strict) - before < 24 << 20


ODD = {
    "up the tree": b"../../etc/passwd",
    "with a zero": b"flair\x00",
    "with a line's end": b"flair%0d%0aSet-Cookie: a=b",
    "not UTF-8": b"\xff\xfe",
    "of 3 kB": b"n" * 3000,
    "of 10 kB": b"n" * 10_000,
    "with a tag": b"<script>alert(1)</script>",
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_name(strict, name):
    """Of a field it is refused, of a file it is not looked at. What is long is no header any more."""
    for field, file, kind in ((ODD[name], b"a", "unknown-field"), (b"flair", ODD[name], None)):
        head = b'--b\r\nContent-Disposition: form-data; name="' + field + b'"; filename="' + file + b'"\r\n\r\n'
        headers = {"content-type": "multipart/form-data; boundary=b"}
        response = strict.http.post("/segment", content=head + GOOD + b"\r\n--b--\r\n", headers=headers)
        if len(ODD[name]) > 4096:
            assert_refused(strict, response, 400, "malformed-multipart", None)
        elif kind:
            shown = response.json()["field"]
            assert len(shown) <= 64
            assert_refused(strict, response, 422, kind, shown)
        else:
            assert response.status_code == 202
            (input_file,) = (strict.store / response.json()["id"] / "input").iterdir()
            assert input_file.name == "flair.nii.gz"
            assert strict.http.delete(response.json()["links"]["self"]).status_code == 204
            until(lambda: strict.on_store() == [])


def test_a_model_that_is_not_there(strict):
    for name in ("nobody", "../tiny", "x" * 200):
        response = strict.http.post("/segment", files={"flair": ("a", GOOD)}, data={"model": name})
        assert_refused(strict, response, 422, "unknown-model", "model")


@pytest.mark.parametrize(
    ("content", "content_type", "status", "kind"),
    [
        (b"{}", "application/json", 415, "not-multipart"),
        (GOOD, "application/gzip", 415, "not-multipart"),
        (b"x", "multipart/form-data", 415, "not-multipart"),
        (b"x", "multipart/form-data; boundary=b", 400, "malformed-multipart"),
        (
            b"--b\r\nContent-Disposition: form-data; name=flair; filename=a\r\n\r\n" + GOOD,
            None,
            400,
            "malformed-multipart",
        ),
        (b"--b\r\n\r\n" + GOOD + b"\r\n--b--\r\n", None, 400, "malformed-multipart"),
        (b"--b\r\nX-A: " + b"a" * (4 << 20), None, 400, "malformed-multipart"),
        (b"\r\n" * (2 << 20), None, 400, "malformed-multipart"),
        (b"\r\n" * (5 << 20), None, 413, "too-large"),
        (b"x" * (5 << 20), None, 400, "malformed-multipart"),
        (
            b'--b\r\nContent-Disposition: form-data; name="t1"; filename=""\r\n\r\n\r\n' * 65,
            None,
            400,
            "malformed-multipart",
        ),
    ],
)
def test_a_body_that_is_no_form(strict, content, content_type, status, kind):
    headers = {"content-type": content_type or "multipart/form-data; boundary=b"}
    assert_refused(strict, strict.http.post("/segment", content=content, headers=headers), status, kind, None)


def test_a_chunked_body_without_end_is_cut_at_the_limit(strict):
    def endless():
        yield b'--b\r\nContent-Disposition: form-data; name="flair"; filename="x"\r\n\r\n' + GOOD
        while True:
            yield bytes(1 << 16)

    headers = {"content-type": "multipart/form-data; boundary=b"}
    began = time.monotonic()
    try:
        response = strict.http.post("/segment", content=endless(), headers=headers)
    except httpx.TransportError:
        # Who never stops sending may miss the answer: the connection is closed after a while.
        response = None
    assert time.monotonic() - began < 30
    if response is not None:
        assert response.status_code == 413
    assert strict.on_store() == []


def test_a_sender_who_hangs_up_leaves_nothing(strict):
    host, port = strict.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /segment HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            b"Content-Length: 1000000\r\n\r\n"
            b'--b\r\nContent-Disposition: form-data; name="flair"; filename="x"\r\n\r\n' + GOOD[:5000]
        )
        until(lambda: strict.on_store() != [])
    until(lambda: strict.on_store() == [])


def test_after_all_that_a_good_upload_is_taken(strict):
    response = strict.http.post("/segment", files={"flair": ("a", GOOD)})
    assert response.status_code == 202
    assert strict.http.delete(response.json()["links"]["self"]).status_code == 204
    until(lambda: strict.on_store() == [])
