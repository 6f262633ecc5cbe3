"""What is in the wheel."""

from __future__ import annotations

from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_ships_every_module_and_nothing_else(names: set[str], root: Path) -> None:
    packages = ("app", "models", "training", "worker")
    code = {p.relative_to(root).as_posix() for package in packages for p in (root / package).rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == code
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == set(packages)


def test_ships_the_tasks(names: set[str], root: Path) -> None:
    tasks = {p.relative_to(root).as_posix() for p in (root / "models" / "tasks").glob("*.yaml")}
    assert "models/tasks/glioma.yaml" in tasks
    assert tasks <= names


def test_ships_the_published_splits(names: set[str], root: Path) -> None:
    folder = root / "training" / "published"
    files = {p.relative_to(root).as_posix() for p in folder.iterdir() if p.suffix in {".csv", ".txt"}}
    assert len(files) == 11
    assert files <= names


def test_ships_the_demo_checkpoint_whole(wheel: Path, names: set[str], root: Path) -> None:
    folder = "models/checkpoints/glioma-phantom-rfnet"
    files = {"card.json", "weights.safetensors"}
    assert {n.removeprefix(f"{folder}/") for n in names if n.startswith(f"{folder}/")} == files
    with ZipFile(wheel) as archive:
        for name in files:
            assert archive.read(f"{folder}/{name}") == (root / folder / name).read_bytes()


def test_stays_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 12 * 2**20


def test_metadata(wheel: Path, names: set[str]) -> None:
    (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
    (scripts,) = (n for n in names if n.endswith(".dist-info/entry_points.txt"))
    with ZipFile(wheel) as archive:
        fields = Parser().parsestr(archive.read(metadata).decode())
        entry_points = archive.read(scripts).decode()
    assert fields["Name"] == "passion-seg"
    assert fields["License-Expression"] == "Apache-2.0"
    assert set(fields.get_all("Provides-Extra", [])) >= {"api", "worker", "training", "phantom", "redis", "dev"}
    assert fields.get_all("License-File") == ["LICENSE", "NOTICE"]
    assert "passion = training.__main__:main" in entry_points
    assert "passion-server = app.cli:main" in entry_points
