"""The clean copy of an upload: the same voxels in the same place, and nothing else of what was sent."""

import errno
import gzip
import io
from itertools import product

import nibabel as nib
import numpy as np
import pytest
from scans import head, image, nifti, nifti_gz

from app.jobs.scan import check
from app.jobs.scan_header import ScanError
from app.jobs.scrub import KEPT
from app.jobs.settings import Settings

LIMITS = Settings(max_uncompressed_bytes=4 << 20)
SECRET = b"Jane Doe 1970"
FREE = {
    **dict.fromkeys(("descrip", "aux_file", "intent_name"), SECRET),
    **{"intent_code": 1001, "intent_p1": 7.5, "intent_p2": 8.5, "intent_p3": 9.5, "cal_max": 5, "cal_min": 1},
    **{"toffset": 5, "slice_start": 1, "slice_end": 9, "slice_code": 3, "slice_duration": 0.5, "dim_info": 57},
}
ONLY = {
    nib.Nifti1Image: {"data_type": b"Jane Doe", "db_name": SECRET, "extents": 19, "session_error": 7, "regular": b"J"},
    nib.Nifti2Image: {"unused_str": SECRET},
}
STRUCTURE = {"sizeof_hdr", "magic", "eol_check", "vox_offset"}
SHEARED = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.1) @ np.diag([-1, 1.5, 3]), [10, -20, 30])
OTHER = nib.affines.from_matvec(np.diag([-1, 1.5, 3]), [1, 2, 3])


def talkative(kind, order, type_name, slope):
    """A .nii file with text wherever there is room for some, 100 KB of extensions, and bytes after the voxels."""
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.dtype(type_name))
    img = kind(head("flair", (9, 8, 7)).astype(type_name), SHEARED, header)
    img.set_sform(SHEARED, 1)
    img.set_qform(OTHER, 3)
    img.header.set_xyzt_units("mm", "sec")
    for code in ("comment", "afni"):
        img.header.extensions.append(nib.nifti1.Nifti1Extension(code, SECRET * 4000))
    data = img.to_bytes()
    changed = kind.header_class.from_fileobj(io.BytesIO(data), check=False)
    for name, value in {**FREE, **ONLY[kind], "scl_slope": slope, "scl_inter": slope - 1}.items():
        changed[name] = value
    changed["dim"][5:] = 77
    changed["pixdim"][4:] = 1970
    size = len(changed.binaryblock)
    return changed.binaryblock + data[size:] + SECRET * 1000


def scrubbed(tmp_path, data):
    (tmp_path / "part-0").write_bytes(data)
    check(tmp_path / "part-0", tmp_path / "flair.nii.gz", LIMITS)
    return (tmp_path / "flair.nii.gz").read_bytes()


@pytest.mark.parametrize(
    ("kind", "order", "type_name", "slope"),
    [(k, o, t, s) for k, o, (t, s) in product(ONLY, "<>", (("i2", 0.25), ("f4", 1)))],
)
def test_voxels_and_place_are_kept_and_nothing_else(tmp_path, kind, order, type_name, slope):
    data = talkative(kind, order, type_name, slope)
    packed = scrubbed(tmp_path, data)
    clean = gzip.decompress(packed)
    before, after = kind.from_bytes(data), nib.load(tmp_path / "flair.nii.gz")
    assert type(after) is kind
    assert after.header.endianness == order
    assert after.get_data_dtype() == before.get_data_dtype() == np.dtype(type_name).newbyteorder(order)
    assert (after.dataobj.slope, after.dataobj.inter) == (slope, slope - 1)
    assert np.array_equal(np.asarray(after.dataobj), np.asarray(before.dataobj))
    assert np.array_equal(after.affine, before.affine)
    for form in ("get_qform", "get_sform"):
        (place, code), (expected, expected_code) = getattr(after, form)(coded=True), getattr(before, form)(coded=True)
        assert code == expected_code
        assert np.array_equal(place, expected)
    assert after.header.get_zooms() == before.header.get_zooms()
    assert after.header.get_xyzt_units() == ("mm", "sec")

    assert b"Jane" not in clean
    assert list(after.header.extensions) == []
    offset = 352 if kind is nib.Nifti1Image else 544
    assert len(clean) == offset + 9 * 8 * 7 * int(type_name[1])
    assert clean[offset - 4 : offset] == bytes(4)
    header = kind.header_class.from_fileobj(io.BytesIO(clean), check=False)
    assert header["vox_offset"] == offset
    assert {name for name in header if bytes(header[name].tobytes()).strip(b"\0")} <= {*KEPT, *STRUCTURE}
    assert header["dim"].tolist() == [3, 9, 8, 7, 1, 1, 1, 1]
    assert header["pixdim"][4:].tolist() == [1] * 4


def test_a_volume_of_four_axes_keeps_them(tmp_path):
    scrubbed(tmp_path, nifti(image(head("flair")[..., None])))
    assert nib.load(tmp_path / "flair.nii.gz").shape == (40, 40, 32, 1)


def test_the_copy_does_not_depend_on_how_the_volume_was_packed(tmp_path):
    data = talkative(nib.Nifti1Image, "<", "i2", 2)
    copies = {
        scrubbed(tmp_path, d)
        for d in (data, gzip.compress(data, 9), gzip.compress(data[:999]) + gzip.compress(data[999:], 1))
    }
    assert len(copies) == 1
    packed = copies.pop()
    assert packed[3] == 0  # no name, no comment in gzip's own header
    assert packed[4:8] == bytes(4)  # no time


NAN = head("flair")
NAN[-1, -1, -1] = np.nan
WHOLE = nifti_gz(image(head("flair")))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (nifti(image(NAN)), "not-finite"),
        (gzip.compress(nifti(image(head("flair"))) + bytes(5 << 20)), "too-large-uncompressed"),
        (WHOLE[:-4], "truncated"),
        (WHOLE[:-8] + bytes(8), "corrupt-gzip"),
    ],
)
def test_nothing_is_left_of_a_volume_that_goes_wrong_at_its_end(tmp_path, data, kind):
    with pytest.raises(ScanError) as caught:
        scrubbed(tmp_path, data)
    assert caught.value.kind == kind
    assert [p.name for p in tmp_path.iterdir()] == ["part-0"]


def test_nothing_is_left_where_there_is_no_room(tmp_path):
    (tmp_path / ".flair.nii.gz.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is looked at
        scrubbed(tmp_path, WHOLE)
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["part-0"]
