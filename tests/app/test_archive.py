"""Zips of DICOM series over HTTP: what is taken, what is refused, and that no header text comes back."""

import io
import shutil
import struct
import zipfile

import numpy as np
import pytest
from dicom_scans import changed, dicom, enhanced, lps, ras, series, zipped
from pydicom.dataset import Dataset
from scans import head, scan
from serving import serving

from app.jobs.archive import check_archive
from app.jobs.scan_header import ScanError

SHAPE = (24, 22, 20)
DATA = head("flair", SHAPE).astype(np.uint16)
GOOD = series(DATA)


@pytest.fixture
def api(settings, tiny):
    shutil.copytree(tiny, settings.models / "tiny")
    with serving(settings) as api:
        yield api


def post(api, **files):
    return api.post("/segment", files={name: ("DOE_JANE.zip", data) for name, data in files.items()})


def test_what_is_taken_and_what_is_refused(api, settings, tmp_path):
    job = post(api, flair=zipped(GOOD), t2=scan("t2", affine=ras(lps()))).json()
    assert job["state"] == "queued"
    assert job["links"]["dicom_seg"] is None
    folder = settings.store / job["id"] / "input"
    assert sorted(p.name for p in folder.iterdir()) == ["flair.zip", "t2.nii.gz"]
    assert api.get(f"/jobs/{job['id']}/dicom-seg").status_code == 409

    other = series(DATA, name="t2", study="earlier")
    said = post(api, flair=zipped(GOOD), t2=zipped(other)).json()["warnings"]
    assert len(said) == 1
    assert "flair and t2 are of different studies" in said[0]
    nameless = [changed(d, PatientID="") for d in series(DATA, name="t2")]
    assert post(api, flair=zipped(GOOD), t2=zipped(nameless)).json()["warnings"] == []
    kept = len(list(settings.store.iterdir()))

    far = lps(origin=(900.0, 0.0, 0.0))
    refused = [
        ("mixed-series", 422, "2 series", {"flair": zipped(GOOD + series(DATA, name="t1"))}),
        ("bad-slices", 422, "as if 1 were missing", {"flair": zipped(GOOD[:5] + GOOD[6:])}),
        ("not-mr-image", 422, "no MR", {"flair": zipped([changed(GOOD[0], SOPClassUID="1.2.840.10008.5.1.4.1.1.2")])}),
        ("not-dicom", 415, "not DICOM", {"flair": zipped(GOOD, README=b"JANE DOE")}),
        ("not-dicom", 415, "no DICOM image", {"flair": zipped([])}),
        ("corrupt-zip", 422, "another zip", {"flair": zipped(GOOD, inner=zipped(GOOD))}),
        ("corrupt-zip", 422, "damaged", {"flair": zipped(GOOD)[:-40]}),
        ("corrupt-zip", 422, "encrypted", {"flair": encrypted(zipped(GOOD))}),
        ("bad-spacing", 422, "mm", {"flair": zipped(series(DATA, lps(spacing=(1, 1, 50))))}),
        ("different-patients", 422, "different", {"flair": zipped(GOOD), "t2": zipped(series(DATA, patient="9"))}),
        ("different-field-of-view", 422, "covers", {"flair": zipped(GOOD), "t2": zipped(series(DATA, far))}),
    ]
    for kind, status, text, files in refused:
        answer = post(api, **files)
        problem = answer.json()
        assert (answer.status_code, problem["type"]) == (status, f"/problems/{kind}"), problem
        assert text in problem["detail"], problem
        assert problem["field"] in files
        assert "JANE" not in answer.text.upper()
    assert len(list(settings.store.iterdir())) == kept, "a refused zip leaves nothing"


def encrypted(data):
    """The zip with the flag of a password on each file."""
    found = bytearray(data)
    for mark, at in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        start = 0
        while (start := found.find(mark, start)) >= 0:
            found[start + at] |= 1
            start += 4
    return bytes(found)


def refusal(data, tmp_path, limits):
    path = tmp_path / "sent"
    path.write_bytes(data)
    with pytest.raises(ScanError) as raised:
        check_archive(path, limits)
    return raised.value.kind


def test_bombs_and_lies(tmp_path, settings):
    small = settings.model_copy(update={"max_uncompressed_bytes": 1 << 20, "max_archive_files": 30})
    assert check_archive(written(tmp_path, zipped(GOOD)), small).shape == SHAPE
    bomb = packed({"a": dicom(GOOD[0]) + bytes(2 << 20)})
    assert len(bomb) < 10_000
    assert refusal(bomb, tmp_path, small) == "too-large-uncompressed"
    told = bytearray(bomb)
    at = told.find(b"PK\1\2") + 24
    told[at : at + 4] = struct.pack("<I", 100)
    assert refusal(bytes(told), tmp_path, small) in {"corrupt-zip", "bad-header"}, "more than it says"
    assert refusal(packed({str(n): b"x" for n in range(31)}), tmp_path, small) == "too-many-files"
    assert (
        refusal(packed({f"{n:0200}": b"" for n in range(9_000)}, zipfile.ZIP_STORED), tmp_path, small) == "corrupt-zip"
    ), "a long list"
    for mark, at, value in ((b"PK\1\2", 28, 0), (b"PK\5\6", 16, 1 << 30)):
        wrong = bytearray(packed({"a": dicom(GOOD[0])}))
        place = wrong.rfind(mark) + at
        wrong[place : place + 2 + 2 * (at == 16)] = value.to_bytes(2 + 2 * (at == 16), "little")
        assert refusal(bytes(wrong), tmp_path, small) == "corrupt-zip", "no name, or a place before the zip"
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        assert refusal(packed({"a": dicom(GOOD[0])}, method), tmp_path, small) == "corrupt-zip"
    deflated = changed(GOOD[0])
    deflated.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    assert refusal(packed({"a": dicom(deflated)}), tmp_path, small) == "bad-data-type"
    many = enhanced(DATA)
    many.PerFrameFunctionalGroupsSequence = [Dataset() for _ in range(100_001)]
    assert refusal(packed({"a": dicom(many)}), tmp_path, settings) == "bad-header"
    assert refusal(b"PK\5\6" + bytes(18), tmp_path, small) == "not-dicom"


def written(tmp_path, data):
    path = tmp_path / "sent"
    path.write_bytes(data)
    return path


def packed(files, method=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def test_damage_anywhere_is_a_refusal(tmp_path, settings, recwarn, capfd):
    """Bytes changed by lot in a zip and in a header: refused, or read, and nothing else; nothing is quoted."""
    rng = np.random.default_rng(5)
    zip_file, file = zipped(GOOD[:3]), dicom(GOOD[0])
    for n in range(120):
        data = bytearray(zip_file if n % 2 else file)
        for place in rng.integers(0, len(data) if n % 2 else 1200, 6):
            data[place] = rng.integers(256)
        try:
            check_archive(written(tmp_path, bytes(data) if n % 2 else packed({"a": bytes(data)})), settings)
        except ScanError as error:
            assert "JANE" not in f"{error} {error.remedy}".upper()  # noqa: PT017
    said = capfd.readouterr()
    assert "JANE" not in (said.out + said.err + "".join(str(w.message) for w in recwarn)).upper()
