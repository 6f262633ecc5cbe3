"""`benchmarks/load.py` runs and says what it measured; how much the service bears is no test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOAD = ["-m", "benchmarks.load"]


@pytest.mark.slow
def test_a_service_is_measured_under_load(tmp_path):
    out = tmp_path / "load.json"
    small = ["--clients", "2", "--files", "1", "--megabytes", "1", "--rounds", "1"]
    small += ["--jobs", "2", "--turns", "1", "--spacing", "6"]
    done = subprocess.run(
        [sys.executable, *LOAD, *small, "--out", out],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    (uploads,) = found["uploads"]
    assert uploads["accepted_in_the_end"] == 2
    assert uploads["answers"]["202"] == 2
    assert uploads["polls"] > 0
    assert uploads["memory_before_mb"] <= uploads["memory_peak_mb"]
    assert found["worker"]["jobs"] == 2
    assert found["worker"]["share_of_bare"] > 0
    assert "2 x 202" in done.stdout
    assert list(tmp_path.iterdir()) == [out]
