import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
from isal import igzip
from scans import UNIT, edited, head, image, nifti, nifti_gz, scan

from app.jobs.scan import Scan, check, check_same_field_of_view, overlap
from app.jobs.scan_header import ScanError
from app.jobs.settings import Settings

LIMITS = Settings(max_uncompressed_bytes=4 << 20, max_voxels=1 << 20)
GOOD = nifti(image(head("flair")))
GOOD2 = nifti(image(head("flair"), kind=nib.Nifti2Image))
HUGE = 2**63 - 1


def tried(tmp_path, data, limits=LIMITS):
    path = tmp_path / "part"
    path.write_bytes(data)
    return check(path, tmp_path / "clean.nii.gz", limits)


OBLIQUE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.1) @ np.diag([1, 1, 3]), [10, -20, 30])


@pytest.mark.parametrize(
    "data",
    [
        scan(),
        GOOD,
        nifti(image(head("flair"), kind=nib.Nifti2Image)),
        nifti(image(head("flair")[..., None])),
        nifti(image(head("flair"), OBLIQUE)),
        nifti(image(head("flair"), np.diag([-1, 1, -2, 1]))),
        nifti(image(head("flair"), sform=0, qform=0)),
        gzip.compress(GOOD[:20_000]) + gzip.compress(GOOD[20_000:]),
        GOOD + b"\0" * 100,
        edited(GOOD, pixdim=[0, 1, 1, 1, 0, 0, 0, 0]),
        *[nifti(image(head("flair").astype(t))) for t in ("u1", "i2", "u2", "i4", "f8", ">i2", ">f4")],
    ],
)
def test_good_volumes(tmp_path, data):
    assert tried(tmp_path, data).shape == (40, 40, 32)


def test_the_affine_is_the_headers(tmp_path):
    assert np.allclose(tried(tmp_path, nifti(image(head("flair"), OBLIQUE))).affine, OBLIQUE, atol=1e-4)


def test_a_scaled_file_is_judged_by_its_scaled_values(tmp_path):
    data = edited(nifti(image(head("t1").astype("i2"))), scl_slope=1e38, scl_inter=0)
    with pytest.raises(ScanError, match="float32"):
        tried(tmp_path, data)
    assert tried(tmp_path, edited(nifti(image(head("t1").astype("i2"))), scl_slope=np.nan, scl_inter=np.nan))


def edited2(**fields):
    """A good NIfTI-2 file with header fields changed behind nibabel's back."""
    return edited(GOOD2, nib.Nifti2Header, **fields)


def extended(*sizes, value=b"Jane Doe", kind=nib.Nifti1Image, order="<"):
    """A file with extensions that say that they have these sizes; the space for them has 80 bytes."""
    header = kind.header_class(endianness=order)
    img = kind(head("flair"), UNIT, header)
    img.header.extensions.append(nib.nifti1.Nifti1Extension(6, value + bytes(50)))
    data = bytearray(img.to_bytes())
    at = header.single_vox_offset
    for size in sizes:
        struct.pack_into(f"{order}2i", data, at, size, 6)
        at += size if 0 < size < 80 else 0
    return bytes(data)


def with_nan():
    data = head("flair")
    data[-1, -1, -1] = np.nan
    return nifti_gz(image(data))


def rgb():
    dtype = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    return nifti(nib.Nifti1Image(np.ones((16, 16, 16), dtype), UNIT))


ZEROS = gzip.compress(bytes(1 << 18), 9)
BAD = {
    "text": (b"hello, I am a scan", "not-nifti"),
    "one byte": (b"\x00", "not-nifti"),
    "three bytes": (GOOD[:3], "not-nifti"),
    "three bytes of gzip": (scan()[:3], "truncated"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(500), "not-nifti"),
    "zip": (b"PK\x03\x04" + bytes(500), "not-nifti"),
    "gzip in gzip": (gzip.compress(scan()), "not-nifti"),
    "gzip of nothing": (gzip.compress(b""), "truncated"),
    "gzipped text": (gzip.compress(b"hello" * 100), "not-nifti"),
    "gzipped short text": (gzip.compress(b"hello"), "truncated"),
    "dicom": (b"\0" * 128 + b"DICM" + b"\0" * 400, "not-nifti"),
    "analyze": (edited(GOOD, magic=b"\0\0\0\0"), "not-nifti"),
    "header of a pair": (edited(GOOD, magic=b"ni1\0"), "two-files"),
    "header only": (GOOD[:348], "truncated"),
    "half a header": (GOOD[:200], "truncated"),
    "voxels missing": (GOOD[:-1], "truncated"),
    "gzip cut off": (scan()[:-2000], "truncated"),
    "gzip damaged": (scan()[:10] + b"\xff" * 50 + scan()[60:], "corrupt-gzip"),
    "gzip check sum": (scan()[:-8] + b"\0" * 8, "corrupt-gzip"),
    "gzip and then text": (scan() + b"hello" * 9, "corrupt-gzip"),
    "gzip with a name of a megabyte": (b"\x1f\x8b\x08\x08" + bytes(6) + b"a" * (1 << 20), "corrupt-gzip"),
    "bomb of a gigabyte": (gzip.compress(GOOD) + ZEROS * 4096, "too-large-uncompressed"),
    "bomb without a header": (ZEROS * 4096, "not-nifti"),
    "bomb in the extensions": (gzip.compress(edited(GOOD, vox_offset=8 << 20)) + ZEROS * 64, "too-large-uncompressed"),
    "bomb": (gzip.compress(GOOD + b"\0" * (5 << 20)), "too-large-uncompressed"),
    "dims claim terabytes": (edited(GOOD, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), "too-many-voxels"),
    "dims beyond 64 bits": (edited2(dim=[3, HUGE, HUGE, HUGE, 1, 1, 1, 1]), "too-many-voxels"),
    "dims whose product is 0 in 64 bits": (edited2(dim=[3, 2**32, 2**32, 2, 1, 1, 1, 1]), "too-many-voxels"),
    "a dim of the least integer": (edited2(dim=[3, -HUGE - 1, 40, 32, 1, 1, 1, 1]), "bad-header"),
    "dims of the largest integer": (edited2(dim=[HUGE, 40, 40, 32, 1, 1, 1, 1]), "bad-header"),
    "eight dims": (edited(GOOD, dim=[8, 40, 40, 32, 1, 1, 1, 1]), "bad-header"),
    "negative dims": (edited(GOOD, dim=[3, -40, 40, 32, 1, 1, 1, 1]), "bad-header"),
    "dims of nothing": (edited(GOOD, dim=[0, 0, 0, 0, 0, 0, 0, 0]), "bad-header"),
    "too many dims": (edited(GOOD, dim=[9, 40, 40, 32, 1, 1, 1, 1]), "bad-header"),
    "a slice": (edited(GOOD, dim=[2, 40, 40, 1, 1, 1, 1, 1]), "not-3d"),
    "a series": (edited(GOOD, dim=[4, 40, 20, 32, 2, 1, 1, 1]), "not-3d"),
    "a thin slab": (edited(GOOD, dim=[3, 40, 40, 1, 1, 1, 1, 1]), "too-few-voxels"),
    "offset past the end": (edited(GOOD, vox_offset=2e6), "truncated"),
    "offset in the header": (edited(GOOD, vox_offset=100), "bad-header"),
    "offset beyond reason": (edited(GOOD, vox_offset=1e20), "bad-header"),
    "offset of nothing": (edited(GOOD, vox_offset=0), "bad-header"),
    "offset negative": (edited(GOOD, vox_offset=-352), "bad-header"),
    "offset in the middle of a byte": (edited(GOOD, vox_offset=352.5), "bad-header"),
    "offset infinite": (edited(GOOD, vox_offset=np.inf), "bad-header"),
    "offset of 64 bits": (edited2(vox_offset=HUGE), "bad-header"),
    "offset of -64 bits": (edited2(vox_offset=-HUGE - 1), "bad-header"),
    "offset in the header of NIfTI-2": (edited2(vox_offset=540), "bad-header"),
    "extension of no bytes": (extended(0), "bad-header"),
    "extension of 8 bytes": (extended(8), "bad-header"),
    "extension of -16 bytes": (extended(-16), "bad-header"),
    "extension of 17 bytes": (extended(17), "bad-header"),
    "extension longer than the file": (extended(2**31 - 16), "bad-header"),
    "extension that reaches into the voxels": (extended(96), "bad-header"),
    "second extension lies": (extended(32, 64), "bad-header"),
    "big-endian extension lies": (extended(96, order=">"), "bad-header"),
    "extension of NIfTI-2 lies": (extended(-1, kind=nib.Nifti2Image), "bad-header"),
    "cut off in an extension": (extended(64)[:380], "truncated"),
    "offset not a number": (edited(GOOD, vox_offset=np.nan), "bad-header"),
    "affine not finite": (edited(GOOD, srow_x=[np.nan, 0, 0, 0]), "bad-affine"),
    "affine infinite": (edited(GOOD, srow_x=[1, 0, 0, np.inf]), "bad-affine"),
    "affine not finite though a qform is there": (edited(GOOD, sform_code=0, srow_y=[0, np.inf, 0, 0]), "bad-affine"),
    "qform not finite": (edited(GOOD, quatern_c=np.nan), "bad-affine"),
    "qform infinitely far": (edited(GOOD, qoffset_z=-np.inf), "bad-affine"),
    "qform impossible though an sform is there": (edited(GOOD, quatern_b=3.0), "bad-affine"),
    "qform of the largest numbers": (edited2(quatern_b=1e308, quatern_c=1e308, sform_code=0), "bad-affine"),
    "sform of the largest numbers": (edited2(srow_x=[1e308, 1e308, 1e308, 0]), "bad-spacing"),
    "pixdim not finite": (edited(GOOD, pixdim=[1, 1, np.nan, 1, 1, 1, 1, 1]), "bad-affine"),
    "pixdim infinite": (edited(GOOD, pixdim=[1, np.inf, 1, 1, 1, 1, 1, 1]), "bad-affine"),
    "qfac odd": (edited(GOOD, pixdim=[7, 1, 1, 1, 1, 1, 1, 1]), "bad-affine"),
    "qfac not a number": (edited(GOOD, pixdim=[np.nan, 1, 1, 1, 1, 1, 1, 1]), "bad-affine"),
    "affine flat": (edited(GOOD, srow_x=[1, 1, 0, 0], srow_y=[0, 0.01, 0, 0]), "bad-affine"),
    "affine far away": (edited(GOOD, srow_x=[1, 0, 0, 1e9]), "bad-affine"),
    "affine zero": (edited(GOOD, srow_x=[0] * 4, srow_y=[0] * 4, srow_z=[0] * 4), "bad-spacing"),
    "qform impossible": (edited(GOOD, sform_code=0, quatern_b=3.0), "bad-affine"),
    "spacing in metres": (nifti(image(head("flair"), np.diag([1e-3, 1e-3, 1e-3, 1]))), "bad-spacing"),
    "spacing huge": (nifti(image(head("flair"), np.diag([1, 1, 500, 1]))), "bad-spacing"),
    "rgb": (rgb(), "bad-data-type"),
    "complex": (nifti(image(head("flair").astype("c8"))), "bad-data-type"),
    "unknown type": (edited(GOOD, datatype=9999), "bad-data-type"),
    "negative type": (edited(GOOD, datatype=-16), "bad-data-type"),
    "long double": (edited(GOOD, datatype=1536, bitpix=128), "bad-data-type"),
    "rgba": (edited(GOOD, datatype=2304, bitpix=32), "bad-data-type"),
    "bits that contradict the type": (edited(GOOD, bitpix=16), "bad-header"),
    "no bits": (edited(GOOD, bitpix=0), "bad-header"),
    "binary type": (edited(GOOD, datatype=1), "bad-data-type"),
    "nan": (with_nan(), "not-finite"),
    "inf": (nifti(image(np.where(head("t1") > 100, np.inf, 1).astype("f4"))), "not-finite"),
    "beyond float32": (nifti(image(head("t1").astype("f8") * 1e300)), "not-finite"),
    "slope infinite": (edited(GOOD, scl_slope=np.inf, scl_inter=0), "bad-header"),
    "slope beyond float32": (edited(GOOD, scl_slope=-3e38, scl_inter=0), "not-finite"),
    "slope beyond float64": (edited2(scl_slope=1e308, scl_inter=-1e308), "not-finite"),
    "intercept not finite": (edited(GOOD, scl_slope=2, scl_inter=np.nan), "bad-header"),
    "zeros": (nifti_gz(image(np.zeros((40, 40, 32), "i2"))), "empty-image"),
    "constant": (nifti_gz(image(np.full((40, 40, 32), 7, "i2"))), "empty-image"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_volumes_say_why(tmp_path, name):
    data, kind = BAD[name]
    with pytest.raises(ScanError) as caught:
        tried(tmp_path, data)
    assert caught.value.kind == kind
    assert caught.value.detail
    assert caught.value.remedy.endswith(".") or "`" in caught.value.remedy
    assert str(tmp_path) not in caught.value.detail


def test_a_bomb_is_stopped_at_the_limit_and_not_after_it(tmp_path, monkeypatch):
    """Of a bomb of 200 MiB no more than the limit (and a chunk) is ever decompressed."""
    read = 0
    original = igzip.IGzipFile.read

    def counting(self, size=-1):
        nonlocal read
        data = original(self, size)
        read += len(data)
        return data

    monkeypatch.setattr(igzip.IGzipFile, "read", counting)
    with pytest.raises(ScanError, match="more than"):
        tried(tmp_path, igzip.compress(GOOD + bytes(200 << 20)))
    assert read <= LIMITS.max_uncompressed_bytes + (1 << 20)


def test_header_extensions_are_skipped(tmp_path):
    img = image(head("flair"))
    img.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe" * 500))
    assert tried(tmp_path, nifti(img)).shape == (40, 40, 32)


def box(offset, size=(100, 100, 100), affine=UNIT):
    moved = affine.copy()
    moved[:3, 3] += offset
    return Scan(size, moved)


def test_overlap_of_boxes():
    assert overlap(box([0, 0, 0]), box([0, 0, 0])) == pytest.approx(1)
    assert overlap(box([0, 0, 0]), box([50, 0, 0])) == pytest.approx(0.5)
    assert overlap(box([0, 0, 0]), box([500, 0, 0])) == 0
    assert overlap(box([0, 0, 0]), box([20, 20, 20], (10, 10, 10))) == pytest.approx(1)
    flipped = np.diag([-1.0, -1, 1, 1])
    assert overlap(box([0, 0, 0]), box([99, 99, 0], affine=flipped)) == pytest.approx(1)


def test_the_one_that_lies_elsewhere_is_named():
    scans = [("flair", box([0, 0, 0])), ("t1", box([5, 0, 0])), ("t2", box([0, 70, 0])), ("t1ce", box([900, 0, 0]))]
    assert check_same_field_of_view(scans, 0.5) == "t2"
    assert check_same_field_of_view(scans[:2], 0.5) is None
    assert check_same_field_of_view([], 0.5) is None


def test_the_header_is_not_trusted_with_the_length(tmp_path):
    data = bytearray(GOOD)
    struct.pack_into("<8h", data, 40, 3, 100, 100, 100, 1, 1, 1, 1)
    with pytest.raises(ScanError, match=r"announces 4000000 bytes of voxels and the file ends after 204800"):
        tried(tmp_path, bytes(data))
