"""The mask lies exactly where the first given volume lies, however that is stored."""

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import from_matvec
from nibabel.eulerangles import euler2mat
from scans import SMALL, head, image, nifti, nifti_gz, read

TURN = euler2mat(0.3, -0.2, 0.15)
GRIDS = {
    "plain": (np.diag([1.0, 1, 1, 1]), SMALL),
    "oblique": (from_matvec(TURN, [12, -34, 56]), SMALL),
    "oblique and anisotropic": (from_matvec(TURN @ np.diag([1, 1, 3.0]), [-5, 10, 0]), (28, 28, 10)),
    "flipped": (from_matvec(np.diag([-1.0, -1, 1]), [40, 40, 0]), SMALL),
    "permuted and flipped": (from_matvec([[0, 0, -1], [1, 0, 0], [0, -1, 0]], [20, 5, 40.0]), (28, 24, 26)),
    "thick slices": (np.diag([1.0, 1, 3, 1]), (28, 28, 10)),
    "fine": (np.diag([0.7, 0.7, 0.7, 1]), (36, 34, 34)),
}


def assert_on_grid_of(mask, given):
    given = nib.Nifti1Image.from_bytes(given.to_bytes())  # as the file holds it, in float32
    assert mask.shape == given.shape[:3]
    assert np.array_equal(mask.affine, given.affine)
    for name in ("sform_code", "qform_code", "xyzt_units"):
        assert mask.header[name] == given.header[name], name
    assert mask.header.get_zooms() == given.header.get_zooms()[:3]
    assert np.array_equal(mask.header.get_sform(), given.header.get_sform())
    assert np.array_equal(mask.header.get_qform(), given.header.get_qform())
    assert mask.get_data_dtype() == np.uint8
    assert mask.header.get_intent()[0] == "label"


@pytest.mark.parametrize("compress", [True, False], ids=["nii.gz", "nii"])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_mask_lies_on_the_first_volumes_grid(stack, grid, compress):
    affine, shape = GRIDS[grid]
    first = image(head("t2", shape), affine, sform=2, qform=1)
    second = image(head("flair", shape), affine, sform=1, qform=1)
    pack = nifti_gz if compress else nifti
    data, _ = stack.mask({"t2": pack(first), "flair": pack(second)})
    mask = read(data)
    assert_on_grid_of(mask, first)
    assert np.asarray(mask.dataobj).any()


@pytest.mark.parametrize(("sform", "qform"), [(1, 0), (0, 1), (4, 2), (3, 3)])
def test_the_codes_are_the_first_volumes(stack, sform, qform):
    first = image(head("t1", SMALL), GRIDS["oblique"][0], sform=sform, qform=qform)
    data, _ = stack.mask({"t1": nifti_gz(first)})
    assert_on_grid_of(read(data), first)


def test_one_volume_of_a_4d_file_and_integers_with_a_slope(stack):
    img = nib.Nifti1Image(head("t1ce", SMALL)[..., None].astype(np.int16), GRIDS["oblique"][0])
    img.header.set_slope_inter(0.5, 3)
    data, _ = stack.mask({"t1ce": nifti_gz(img)})
    assert_on_grid_of(read(data), img)


def test_volumes_on_different_grids_come_back_on_the_first(stack):
    thick, fine = GRIDS["thick slices"], GRIDS["plain"]
    first = image(head("flair", thick[1]), thick[0])
    second = image(head("t1", fine[1]), fine[0])
    # As they are: there is nothing in a ball of noise to tell how it is turned.
    data, _ = stack.mask({"flair": nifti_gz(first), "t1": nifti_gz(second)}, preprocess="none")
    assert_on_grid_of(read(data), first)
    data, _ = stack.mask({"t1": nifti_gz(second), "flair": nifti_gz(first)}, preprocess="none")
    assert_on_grid_of(read(data), second)


def test_nothing_of_the_headers_texts_comes_back(stack):
    img = image(head("t1", SMALL))
    img.header["descrip"] = b"Jane Doe 1970"
    img.header["aux_file"] = b"jane.txt"
    img.header["db_name"] = b"JANE"
    img.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    data, _ = stack.mask({"t1": nifti_gz(img)})
    mask = read(data)
    assert b"jane" not in mask.to_bytes().lower()
    names = b"".join(extension.get_content() for extension in mask.header.extensions)
    assert b"enhancing tumour" in names
