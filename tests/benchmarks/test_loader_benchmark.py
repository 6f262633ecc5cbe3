"""`benchmarks/loader.py` runs and says what it measured; how fast anything is, is no test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.page_cache import drop, resident_pages

LOADER = Path(__file__).parents[2] / "benchmarks" / "loader.py"


@pytest.mark.slow
def test_the_loader_is_measured_against_the_step(tmp_path):
    out = tmp_path / "loader.json"
    small = ["--subjects", "2", "--shape", "60", "64", "48", "--crop", "32", "--epochs", "2", "--present", "2"]
    command = [sys.executable, LOADER, *small, "--steps", "2", "--device", "cpu", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    settings = [(r["loader"]["foreground"], r["loader"]["cold"]) for r in record["rows"]]
    assert settings == [(0.0, False), (0.0, True), (0.5, False), (0.5, True)]
    for row in record["rows"]:
        assert row["loader"]["present"] == row["step"]["present"] == ["flair", "t1"]
        assert row["loader"]["samples"] == 4
        assert row["ratio"] == pytest.approx(row["loader"]["samples_per_s"] * row["step"]["best_warm_s"])
        assert 0 <= row["loader"]["read_mb_per_sample"] <= row["loader"]["case_mb"]
        assert f"**{row['ratio']:.0f}**" in done.stdout
    assert record["least_ratio"] == min(row["ratio"] for row in record["rows"])
    assert list(tmp_path.iterdir()) == [out]


def test_pages_in_memory_are_counted(tmp_path):
    path = tmp_path / "file"
    page = os.sysconf("SC_PAGE_SIZE")
    path.write_bytes(b"x" * (10 * page + 1))
    drop(path)
    path.read_bytes()
    assert resident_pages(path) == [True] * 11
