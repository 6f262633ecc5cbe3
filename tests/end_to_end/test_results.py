"""What there is beside a mask, from outside: fetched, read back, and nothing of the sender's header in it."""

import gzip
import io

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scans import SMALL, head, image, nifti_gz, read


def scanned():
    scan = image(head("flair", SMALL))
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
