"""`passion experiment`, as a user runs it: killed and run again, with a cell that cannot work, and without its data."""

import csv
import fcntl
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from training.experiments import files

pytestmark = pytest.mark.slow

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def command(*arguments):
    return [sys.executable, "-m", "training", "experiment", *(str(a) for a in arguments)]


def run(*arguments):
    return subprocess.run(command(*arguments), env=ONE_THREAD, capture_output=True, text=True, timeout=500, check=False)


def kept(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def wait_for(condition, process):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def nobody_at_work(folder):
    """The runner's lock is held by its runs as well, so it is free only when all of them are gone."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def test_a_killed_runner_leaves_nothing_running_and_goes_on_where_it_was(tmp_path, small_phantoms):
    content = yaml.safe_load(files.shipped()["tiny"].read_text())
    content["train"] |= {"epochs": 4, "crop": [16, 16, 16]}
    content["evaluate"] = {"subsets": ["flair", "t1ce", "t1", "t2"]}
    content["data"]["phantom"]["test"]["subjects"] = 1
    definition, out = tmp_path / "tiny.yaml", tmp_path / "results"
    definition.write_text(yaml.safe_dump(content))
    # Those to train on are there, as after a kill that came later; the one to test on is made.
    out.mkdir()
    shutil.copy(definition, out / "definition.yaml")
    for index in range(1, 4):
        name = f"Phantom_{index:04d}"
        shutil.copytree(small_phantoms / name, out / "work" / "phantoms-train" / name)
    first, second = (out / "work" / "runs" / f"rfnet-mr2468-{arm}-seed1" for arm in ("baseline", "passion"))
    log = second / "out" / "log.jsonl"

    process = subprocess.Popen(
        command(definition, "--out", out, "--jobs", 1, "--devices", "cpu"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ONE_THREAD,
    )
    try:
        wait_for(lambda: log.exists() and "\n" in log.read_text(), process)
        assert not nobody_at_work(out)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 60
    while not nobody_at_work(out):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (first / "cell.json").exists()
    assert not (second / "cell.json").exists()
    done_before = len(log.read_text().splitlines())
    before = kept(first)

    again = run(definition, "--out", out, "--jobs", 1, "--devices", "cpu")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "2 cells, 1 finished before" in again.stdout
    assert kept(first) == before
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == list(range(4))
    assert (second / "train.txt").read_text().count("epoch 0:") == (1 if done_before else 0)

    report = (out / "report.md").read_text()
    assert "All 2 cells are finished." in report
    assert "plots/preference-rfnet-mr2468.png" in report
    with gzip.open(out / "scores.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    assert {(r["arm"], r["modalities"]) for r in rows} == {
        (arm, name) for arm in ("baseline", "PASSION") for name in ("flair", "t1ce", "t1", "t2")
    }
    assert len(json.loads((out / "runs.json").read_text())["runs"]) == 2

    # Somebody else has the results alone: the report can be made again, and is the same.
    shutil.rmtree(out / "work")
    (out / "report.md").unlink()
    rebuilt = run(definition, "--out", out, "--report")
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert (out / "report.md").read_text() == report


def test_a_cell_that_fails_is_told_and_does_not_take_the_others_down(tmp_path, small_phantoms, small_task_file):
    raw = tmp_path / "raw"
    shutil.copytree(small_phantoms, raw)
    for case in raw.iterdir():
        (case / f"{case.name}_t2.nii.gz").unlink()  # nobody is complete
    text = (case / f"{case.name}_flair.nii.gz").read_bytes()
    (case / f"{case.name}_t2.nii.gz").write_bytes(text)  # but for one, so that t2 can be learnt at all
    definition = tmp_path / "real.yaml"
    definition.write_text(
        f"""
name: real
data: {{task: {small_task_file}, source: {{published: false, val: 0, test: 1}}}}
imbalances: [{{name: as-it-is, missing: {{t1: 0.1}}}}]
backbones: [rfnet]
arms: [{{name: complete, method: none, regime: pdt}}, {{name: baseline}}]
seeds: [{seed_that_trains_on(case.name, [c.name for c in raw.iterdir()])}]
train: {{epochs: 1, crop: [16, 16, 16]}}
evaluate: {{subsets: [flair]}}
"""
    )
    out = tmp_path / "results"
    published = run("brats2020-main", "--out", out, "--data", raw)
    assert published.returncode == 2
    assert "lacks 369 of the 369 subjects of the published lists" in published.stderr
    assert "name their folder with --data" in run(definition, "--out", out).stderr
    result = run(definition, "--out", out, "--data", raw, "--devices", "cpu", "--jobs", 1)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "failed: rfnet, nothing missing, complete" in result.stdout
    assert "regime pdt trains on complete subjects" in result.stdout
    report = (out / "report.md").read_text()
    assert "**1 of 2 cells are missing**" in report
    assert "| baseline | 1 | " in report


def seed_that_trains_on(wanted, ids):
    """A seed whose split leaves this subject in training."""
    from training.splits import Split

    return next(seed for seed in range(100) if wanted in Split.draw(ids, 0, 1, seed).train)
