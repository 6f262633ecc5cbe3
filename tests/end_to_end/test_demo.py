"""The demo of the README, on a smaller patient."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).with_name("demo.py")


@pytest.mark.slow
def test_the_demo_leaves_a_mask_and_a_picture_and_nothing_running(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    root = DEMO.parents[2]
    done = subprocess.run(
        [sys.executable, str(DEMO), "--out", str(out), "--shape", "96,96,72"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "not a medical device" in done.stdout
    assert "96 x 96 x 72 voxels, uint8, on the grid of the T2" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines() if " mL " in line] == ["WT", "TC", "ET"]
    assert (out / "mask.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "mask.nii.gz").is_file()
    port = re.search(r"ready at http://127\.0\.0\.1:(\d+)", done.stdout)
    assert port is not None
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(port.group(1)))) != 0
