"""`passion-server segment --batch`, and what else the client asks for and saves: as processes, of a running service."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from scans import SMALL, read, scan

from app.client_batch import BatchError, find_patients, form_of_batch

LONG = scan("t2", (48, 48, 48))
"""Some seconds of work, in which the client is stopped."""


def command(stack, *arguments):
    return [sys.executable, "-m", "app.cli", "segment", "--url", stack.url, *map(str, arguments)]


def run(stack, *arguments):
    return subprocess.run(command(stack, *arguments), check=False, capture_output=True, text=True, timeout=120)


@pytest.fixture
def patients(tmp_path):
    """By BraTS's names of 2023, by BIDS's with a session, and one whose scan is none."""
    files = {
        "A/A-t1n.nii.gz": scan("t1", SMALL),
        "A/A-t2f.nii.gz": scan("flair", SMALL),
        "A/A-seg.nii.gz": scan("t1", SMALL),
        "C/C_flair.nii.gz": b"no scan",
        "D/notes.nii.gz": b"",
        "E/ses-1/anat/sub-E_ses-1_T2w.nii.gz": LONG,
    }
    for name, data in files.items():
        path = tmp_path / "patients" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "patients"


def rows(out):
    """The report's rows by patient; empty while there is none."""
    try:
        return {row["patient"]: row for row in json.loads((out / "report.json").read_text())["patients"]}
    except FileNotFoundError:
        return {}


@pytest.mark.slow
def test_a_batch_is_stopped_and_taken_up_again(stack, patients, tmp_path):
    out = tmp_path / "out"
    batch = ("--batch", patients, "-o", out, "--et-value", 4, "--save", "report", "--save", "preview")
    one_by_one = command(stack, *batch, "--at-once", 1)  # so that only the last is on its way
    process = subprocess.Popen(one_by_one, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while not rows(out).get("E_ses-1", {}).get("job"):
            assert process.poll() is None
            assert time.monotonic() < end, rows(out)
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "the same command takes it up" in said
    assert "A: t1: A-t1n.nii.gz" in said
    assert "A: not taken: A-seg.nii.gz (labels, no scan)" in said
    first = rows(out)
    assert first["C"]["state"] == "failed"
    sent = first["E_ses-1"]
    assert sent["state"] == "sent"
    assert stack.http.get(sent["job"]).json()["state"] in ("queued", "running", "succeeded")
    assert stack.http.get(first["A"]["job"]).status_code == 404, "what is done is left at the service"
    (patients / "C" / "C_flair.nii.gz").write_bytes(scan("flair", SMALL))

    again = run(stack, *batch)
    assert again.returncode == 1, again.stderr
    assert "A: done before" in again.stderr
    assert "3 of 4 patients done" in again.stdout
    now = rows(out)
    assert now["A"] == first["A"]
    assert (now["E_ses-1"]["state"], now["E_ses-1"]["job"]) == ("done", sent["job"]), "it was sent a second time"
    assert [now[name]["state"] for name in "CD"] == ["done", "failed"]
    assert "no scan found by name" in now["D"]["error"]
    assert set(os.listdir(out)) == {"report.json", "report.csv"} | {
        f"{name}{ending}" for name in ("A", "E_ses-1", "C") for ending in (".nii.gz", "-report.json", "-preview.png")
    }
    mask, job = stack.mask({"flair": scan("flair", SMALL), "t1": scan("t1", SMALL)}, et_value="4")
    assert (out / "A.nii.gz").read_bytes() == mask
    assert now["A"]["volumes_ml"]["WT"] == pytest.approx(job["volumes_ml"]["WT"], abs=1e-3)
    assert now["A"]["labels"]["4"] == "enhancing tumour"
    assert json.loads((out / "A-report.json").read_text())["labels"][3]["value"] == 4
    with (out / "report.csv").open(newline="") as file:
        table = {row["patient"]: row for row in csv.DictReader(file)}
    assert (table["A"]["modalities"], table["A"]["missing"], table["A"]["mask"]) == ("flair+t1", "t1ce+t2", "A.nii.gz")
    assert (table["D"]["state"], table["D"]["WT_ml"]) == ("failed", "")

    other = run(stack, "--batch", patients, "-o", out, "--et-value", 3)
    assert other.returncode == 1
    assert "choose another folder" in other.stderr
    assert other.stderr.count("\n") == 1


def test_what_the_form_has_and_what_is_saved(stack, tmp_path):
    for name in ("flair", "t2"):
        (tmp_path / f"{name}.nii.gz").write_bytes(scan(name, SMALL))
    out = tmp_path / "mask.nii"
    given = ("--flair", tmp_path / "flair.nii.gz", "--t2", tmp_path / "t2.nii.gz", "-o", out)
    options = ("--model", "tiny", "--preprocess", "none", "--grid", "t2", "--et-value", 4, "--keep")
    done = run(stack, *given, *options, "--save", "probabilities", "--save", "report")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "mask-report.json").read_text())
    job = stack.http.get(report["links"]["self"]).json()
    assert (job["model"], job["preprocess"], job["grid"], job["labels"][3]["value"]) == ("tiny", "none", "t2", 4)
    for region in ("WT", "TC", "ET"):
        probabilities = read((tmp_path / f"mask-{region}-probability.nii.gz").read_bytes()).get_fdata()
        assert probabilities.shape == SMALL
        assert 0 < np.max(probabilities) <= 1
    stack.http.delete(job["links"]["self"])
    refused = run(stack, *given, "--et-value", 5)
    assert refused.returncode == 2
    assert "'5' is no value for enhancing tumour. Name one of: 3, 4" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--batch", "{empty}", "-o", "{empty}"], 2, "holds no folders"),
        (["--batch", "{empty}", "-o", "{empty}/m.nii.gz"], 2, "-o is the folder for the masks"),
        (["--batch", "{empty}", "--folder", "{empty}", "-o", "{empty}"], 2, "one of the three"),
    ],
)
def test_a_batch_that_cannot_begin_is_one_line(stack, tmp_path, arguments, status, words):
    (tmp_path / "empty").mkdir()
    done = run(stack, *(a.format(empty=tmp_path / "empty") for a in arguments))
    assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
    assert words in done.stderr


def test_a_batch_waits_behind_others_where_the_service_knows_of_that():
    assert form_of_batch({"model": "m"}, {"model": {"enum": ["m"]}}) == {"model": "m"}
    fields = {"priority": {"enum": ["normal", "batch"]}}
    assert form_of_batch({"model": "m"}, fields) == {"model": "m", "priority": "batch"}
    assert form_of_batch({"priority": "normal"}, fields) == {"priority": "normal"}


def test_two_folders_of_one_name_are_refused(tmp_path):
    for name in ("P/ses-1", "P_ses-1"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(BatchError, match="two folders would be called P_ses-1"):
        find_patients(tmp_path)
