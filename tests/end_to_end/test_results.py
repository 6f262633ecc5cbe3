"""What there is beside a mask, from outside: fetched, read back, and nothing of the sender's header in it."""

import gzip
import io
import shutil

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
from dicom_scans import PATIENT, lps, ras, series, zipped
from PIL import Image
from raw_scans import moved, patient
from scans import SMALL, head, image, nifti_gz, read

from models.volume import save_image


def scanned(**of):
    scan = image(head("flair", SMALL), **of)
    scan.header["descrip"] = b"DOE^JANE"
    scan.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JANE"))
    return nifti_gz(scan)


def test_a_job_gives_a_report_a_picture_and_probabilities(stack):
    content, job = stack.mask({"flair": scanned()}, probabilities="true", et_value="4")
    mask, links = read(content), job["links"]
    assert b"4 enhancing tumour" in mask.header["descrip"].item()
    report = stack.http.get(links["report"])
    facts = report.json()
    assert facts["grid"]["shape"] == list(mask.shape)
    for region in facts["regions"]:
        counted = np.isin(np.asarray(mask.dataobj), region["values"]).sum()
        assert region["volume_ml"] == pytest.approx(counted * facts["grid"]["voxel_ml"])
        assert region["volume_ml"] == job["volumes_ml"][region["name"]]
        assert region["values"][-1] == 4, "each of the regions has the enhancing tumour"
    assert facts["labels"] == job["labels"]
    assert job["labels"][3] == {"value": 4, "name": "enhancing tumour"}
    assert facts["software"]["worker"]["torch"]
    assert any("Dice of only 0.50 for WT from flair" in text for text in facts["warnings"])
    assert facts["warnings"] == job["warnings"]
    preview = stack.http.get(links["preview"])
    with Image.open(io.BytesIO(preview.content)) as picture:
        assert picture.format == "PNG"
    answers = [report.content, preview.content]
    for region in stack.http.get(links["probabilities"]).json()["regions"]:
        data = stack.http.get(region["href"]).content
        probabilities = read(data)
        assert (probabilities.shape, probabilities.affine.tolist()) == (mask.shape, mask.affine.tolist())
        assert 0 <= probabilities.get_fdata().max() <= 1
        answers.append(gzip.decompress(data))
    assert len(answers) == 5
    assert all(b"DOE" not in answer for answer in answers)
    assert stack.http.delete(links["self"]).status_code == 204
    assert stack.http.get(links["report"]).status_code == 404


@pytest.fixture
def small(stack, small_checkpoint):
    """The name of a model of 6 mm, served beside the one that all tests have."""
    place = stack.models / "small"
    shutil.copytree(small_checkpoint, place)
    yield place.name
    shutil.rmtree(place)


@pytest.mark.slow
def test_raw_scans_are_registered_on_the_way(stack, small, tmp_path):
    """A moved FLAIR with thicker slices comes back with a mask on its own grid, and is told how far it had moved."""
    files = {}
    for name, volume in {"flair": moved("flair"), "t1": patient()["t1"]}.items():
        files[name] = tmp_path / f"{name}.nii.gz"
        save_image(volume.grid.image(volume.data), files[name])
    content, job = stack.mask(files, model=small, preprocess="raw")
    assert job["preprocess"] == "raw"
    assert job["seconds"]["preparing"] > 0
    assert job["warnings"][0].startswith("The scans were registered to t1: flair by ")
    mask, flair = read(content), moved("flair").grid
    assert mask.shape == flair.shape
    np.testing.assert_allclose(mask.affine, flair.affine, atol=1e-4)
    assert np.asarray(mask.dataobj).any()
    left_alone, _ = stack.mask(files, model=small, preprocess="none")
    assert not np.array_equal(np.asarray(read(left_alone).dataobj), np.asarray(mask.dataobj))


def test_a_dicom_series_gives_a_dicom_seg(stack):
    affine = lps(spacing=(1.0, 1.0, 1.0))
    data = head("flair", SMALL).astype(np.uint16)
    content, job = stack.mask({"flair": zipped(series(data, affine)), "t2": scanned(affine=ras(affine))})
    mask = read(content)
    np.testing.assert_allclose(mask.affine, ras(affine), atol=1e-4)
    answer = stack.http.get(job["links"]["dicom_seg"])
    assert answer.headers["content-type"] == "application/dicom"
    assert f"{job['id']}-mask.dcm" in answer.headers["content-disposition"]
    seg = hd.seg.segread(io.BytesIO(answer.content))
    voxels = sum(int((seg.get_volume(segment_numbers=[n]).array > 0).sum()) for n in seg.segment_numbers)
    assert voxels == np.count_nonzero(np.asarray(mask.dataobj)) > 0
    assert seg.PatientName == PATIENT
    shown = (stack.http.get(job["links"][name]).content for name in ("self", "report", "preview"))
    assert all(b"DOE" not in answer for answer in (gzip.decompress(content), *shown))
    log = (stack.store.parent / "log").read_text()
    assert "DOE" not in log
