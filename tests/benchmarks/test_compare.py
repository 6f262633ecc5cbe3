"""The benchmarks run and say what they measured; how fast anything is, is no test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPARE = Path(__file__).parents[2] / "benchmarks" / "compare.py"


@pytest.mark.slow
def test_ours_and_the_baseline_are_measured_side_by_side(tmp_path):
    out = tmp_path / "bench.json"
    small = ["--backbone", "rfnet", "--present", "1", "--crop", "32", "--box", "80", "--steps", "2", "--runs", "2"]
    command = [sys.executable, COMPARE, "--device", "cpu", *small, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert [(r["what"], r["modalities"]) for r in record["rows"]] == [("training step", 1), ("segmented box", 1)]
    for row in record["rows"]:
        for implementation in ("ours", "straightforward"):
            figures = row[implementation]
            assert figures["implementation"] == implementation
            assert figures["present"] == ["flair"]
            assert figures["best_warm_s"] > 0
            assert 0.1 < figures["peak_gib"] < 16
    ratio = record["rows"][0]["straightforward"]["best_warm_s"] / record["rows"][0]["ours"]["best_warm_s"]
    assert f"**{ratio:.1f}**" in done.stdout
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_a_sample_is_timed_for_every_number_of_subjects(tmp_path):
    out = tmp_path / "subjects.json"
    small = ["--subjects", "1", "2", "--samples", "2", "--rounds", "2", "--crop", "16", "--backbone", "unet"]
    command = [sys.executable, COMPARE.with_name("subjects.py"), *small, "--device", "cpu", "--out", out]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=one_thread)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert [r["subjects"] for r in record["rows"]] == [1, 2]
    assert all(len(r["seconds_a_sample"]) == 2 and min(r["seconds_a_sample"]) > 0 for r in record["rows"])
    assert record["processes"] == 1
    assert "| subjects |" in done.stdout


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_on_a_cpu(tmp_path):
    out = tmp_path / "gpu.json"
    small = [
        "--backbone",
        "unet",
        "--crop",
        "16",
        "--subjects",
        "2",
        "--shape",
        "40",
        "40",
        "32",
        "--workers",
        "1",
        "--epochs",
        "2",
    ]
    command = [sys.executable, COMPARE.with_name("gpu.py"), *small, "--parts", "epoch", "--device", "cpu", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["bandwidth"] > 0
    assert [row["precision"] for row in record["epoch"]] == list(record["rates"])
    assert all(0 < row["in steps, %"] <= 100 for row in record["epoch"])
    assert "| epoch |" in done.stdout
