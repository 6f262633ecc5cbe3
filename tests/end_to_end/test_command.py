"""`passion-server segment`: what it says and how it ends."""

import os
import shutil
import subprocess
import sys

import pytest
from scans import SMALL, read, write


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write(tmp_path_factory.mktemp("Jane Doe"), ("flair", "t1"), shape=SMALL)


def command(*arguments, url=None):
    environment = os.environ | ({"PASSION_URL": url} if url else {})
    return subprocess.run(
        [sys.executable, "-m", "app.cli", "segment", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )


def test_writes_the_mask_and_says_what_to_expect(stack, files, tmp_path):
    out = tmp_path / "mask.nii.gz"
    before = stack.on_store()
    done = command("--flair", files["flair"], "-o", out, url=stack.url)
    assert done.returncode == 0, done.stderr
    assert read(out.read_bytes()).shape == SMALL
    for words in ("WT", "TC", "ET", "0.500", "not measured", "nothing but noise", "not a medical device"):
        assert words in " ".join(done.stdout.split()), words
    assert os.listdir(tmp_path) == ["mask.nii.gz"]
    assert stack.on_store() == before, "the job was not deleted"


@pytest.fixture
def patient(files, tmp_path):
    """A BIDS folder of the patient, with a mask beside the scans."""
    folder = tmp_path / "patient"
    (folder / "anat").mkdir(parents=True)
    shutil.copy(files["t1"], folder / "anat" / "sub-01_T1w.nii.gz")
    shutil.copy(files["flair"], folder / "anat" / "sub-01_FLAIR.nii.gz")
    (folder / "anat" / "sub-01_mask.nii.gz").write_bytes(b"")
    return folder


def test_takes_a_folder_and_says_what_for_what(stack, files, patient, tmp_path):
    done = command("--folder", patient, "-o", tmp_path / "folder.nii.gz", url=stack.url)
    assert done.returncode == 0, done.stderr
    said = (
        "flair: anat/sub-01_FLAIR.nii.gz",
        "t1: anat/sub-01_T1w.nii.gz",
        "not taken: anat/sub-01_mask.nii.gz (labels, no scan)",
    )
    assert done.stderr.splitlines()[:3] == list(said)
    mask, _ = stack.mask({name: files[name] for name in ("flair", "t1")})
    assert (tmp_path / "folder.nii.gz").read_bytes() == mask


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "two files for t1: anat/sub-01_T1w.nii.gz and sub-01_t1.nii; keep one, or name the scans with --image"),
        (["--t1", "{folder}/anat/sub-01_T1w.nii.gz"], 2, "give --folder or volumes by name, not both"),
        (["--model", "none"], 2, "there is no model 'none'. Name one of: tiny"),
        (["--url", "http://127.0.0.1:1"], 1, "cannot reach http://127.0.0.1:1"),
    ],
)
def test_folders_that_are_refused(stack, patient, tmp_path, arguments, status, words):
    (patient / "sub-01_t1.nii").write_bytes(b"")
    given = [a.format(folder=patient) for a in arguments]
    done = command("--folder", patient, "-o", tmp_path / "m.nii.gz", *given, url=stack.url)
    assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
    assert words in done.stderr
    assert not (tmp_path / "m.nii.gz").exists()


def test_keeps_the_job_if_asked(stack, files, tmp_path):
    before = set(stack.on_store())
    done = command("--t1", files["t1"], "-o", tmp_path / "m.nii", "--keep", "--url", stack.url)
    assert done.returncode == 0
    (kept,) = set(stack.on_store()) - before
    assert (stack.store / kept / "input" / "t1.nii.gz").is_file()
    assert stack.http.delete(f"/jobs/{kept}").status_code == 204


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "give at least one volume"),
        (["--flair", "nowhere.nii.gz"], 2, "nowhere.nii.gz: no such file"),
        (["--image", "flair"], 2, "write NAME=FILE"),
        (["--image", "dwi={flair}"], 2, "'dwi' is no modality of the model. Name the field flair or t2f"),
        (["--flair", "{flair}", "--image", "t2f={t1}"], 2, "are the same modality"),
        (["--flair", "{flair}", "--image", "flair={t1}"], 2, "flair is given twice"),
        (["--flair", "{flair}", "--model", "none"], 2, "there is no model 'none'. Name one of: tiny"),
        (["--flair", "{text}"], 2, "flair: this is neither a NIfTI file nor a gzip file"),
        (["--flair", "{flair}", "--url", "http://127.0.0.1:1"], 1, "cannot reach http://127.0.0.1:1"),
        (["--flair", "{flair}", "-o", "mask.txt"], 2, "must end in .nii.gz or .nii"),
        (["--flair", "{flair}", "-o", "{text}/mask.nii"], 2, "is no folder"),
        (["--flair", "{flair}", "-o", "{folder}/mask.nii"], 1, "cannot write"),
    ],
)
def test_what_goes_wrong_is_one_line_and_a_status(stack, files, tmp_path, arguments, status, words):
    text = tmp_path / "text"
    text.write_text("not voxels")
    (tmp_path / "folder" / "mask.nii").mkdir(parents=True)
    names = {"flair": files["flair"], "t1": files["t1"], "text": text, "folder": tmp_path / "folder"}
    given = [a.format(**names) for a in arguments]
    done = command("-o", tmp_path / "mask.nii.gz", *given, url=stack.url)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "mask.nii.gz").exists()
