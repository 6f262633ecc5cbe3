"""The API, installed as its users install it: from the wheel, with the constraints, into an environment of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HEAVY = {"torch", "monai", "scipy", "safetensors", "nilearn", "matplotlib", "tensorboard"}

IMPORT_ALL_OF_APP = """
import importlib, pkgutil, sys
import app
names = [m.name for m in pkgutil.walk_packages(app.__path__, "app.")]
assert "app.web.routes" in names, names
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(app.__file__)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, wheel: Path, root: Path) -> Path:
    """An environment's folder."""
    folder = tmp_path_factory.mktemp("api") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*command, "-c", str(root / "constraints.txt"), f"{wheel}[api]"], check=True, timeout=300)
    return folder


def _output(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_brings_no_torch(environment: Path, tmp_path: Path) -> None:
    code = "from importlib.metadata import distributions; print(*(d.name.lower() for d in distributions()))"
    installed = set(_output(environment / "bin" / "python", "-c", code, cwd=tmp_path).split())
    assert {"passion-seg", "fastapi", "celery"} <= installed
    assert not installed & HEAVY
    assert not {name for name in installed if name.startswith("nvidia")}


def test_every_module_of_the_service_imports(environment: Path, tmp_path: Path) -> None:
    where = _output(environment / "bin" / "python", "-c", IMPORT_ALL_OF_APP, cwd=tmp_path).strip()
    assert Path(where).is_relative_to(environment)


def test_its_command_runs(environment: Path, tmp_path: Path) -> None:
    assert "segment" in _output(environment / "bin" / "passion-server", "--help", cwd=tmp_path)


def test_passion_without_its_libraries_says_what_to_install(environment: Path, tmp_path: Path) -> None:
    command = [str(environment / "bin" / "passion"), "train", "run.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "passion-seg[training]" in done.stderr
    assert "Traceback" not in done.stderr
