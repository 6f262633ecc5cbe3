"""The compose files, read by Docker Compose itself; it needs no engine for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROJECTS = {
    "cpu": ["compose.yaml"],
    "gpu": ["compose.yaml", "compose.gpu.yaml"],
    "s3": ["compose.yaml", "compose.s3.yaml"],
}


def _compose(root: Path, files: list[str], *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).parent / "docker-compose"
    chosen = [part for name in files for part in ("-f", name)]
    return subprocess.run(
        [str(tool), *chosen, "--profile", "training", "--profile", "mixed", *arguments],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _services(root: Path, files: list[str], **environment: str) -> dict[str, Any]:
    done = _compose(root, files, "config", "--format", "json", **environment)
    assert done.returncode == 0, done.stderr
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


def test_no_compose_file_is_forgotten(root: Path) -> None:
    assert {p.name for p in root.glob("compose*.y*ml")} == {name for files in PROJECTS.values() for name in files}


@pytest.mark.parametrize("files", PROJECTS.values(), ids=PROJECTS)
def test_compose_accepts_it(root: Path, files: list[str]) -> None:
    done = _compose(root, files, "config", "-q")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_everything_runs_locked_down(root: Path) -> None:
    services = _services(root, PROJECTS["cpu"])
    assert set(services) == {"redis", "api", "worker", "training"}
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert not service.get("privileged"), name


def test_only_the_api_is_published_and_only_to_this_machine(root: Path) -> None:
    services = _services(root, PROJECTS["cpu"])
    assert [name for name, service in services.items() if "ports" in service] == ["api"]
    assert [port["host_ip"] for port in services["api"]["ports"]] == ["127.0.0.1"]


def test_base_image_and_index_can_be_chosen(root: Path) -> None:
    chosen = {"BASE_IMAGE": "example/python:3.12", "PIP_INDEX_URL": "file:///index"}
    services = _services(root, PROJECTS["cpu"], **chosen)
    for name in ("api", "worker", "training"):
        arguments = services[name]["build"]["args"]
        assert {key: arguments[key] for key in chosen} == chosen


def test_the_override_gives_worker_and_training_a_gpu(root: Path) -> None:
    services = _services(root, PROJECTS["gpu"])
    for name in ("worker", "training"):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
    assert "deploy" not in services["api"]
    other = services["worker-cpu"]
    assert "deploy" not in other
    assert other["environment"]["PASSION_SERVE_DEVICES"] == other["environment"]["PASSION_DEVICE"] == "cpu"
    assert other["read_only"] is True
    assert set(other["networks"]) == {"inside"}


def test_the_bucket_can_be_reached_by_the_worker(root: Path) -> None:
    services = _services(root, PROJECTS["s3"])
    assert set(services["worker"]["networks"]) == set(services["api"]["networks"]) == {"inside", "outside"}


@pytest.mark.parametrize("role", ["api", "worker", "training"])
def test_a_dockerfile_takes_base_and_index_as_arguments_and_drops_root(root: Path, role: str) -> None:
    lines = (root / "docker" / f"{role}.Dockerfile").read_text().splitlines()
    assert all(line.startswith("FROM ${BASE_IMAGE}") for line in lines if line.startswith("FROM"))
    assert {line.split("=")[0] for line in lines if line.startswith("ARG")} >= {
        "ARG BASE_IMAGE",
        "ARG PIP_INDEX_URL",
        "ARG PIP_EXTRA_INDEX_URL",
    }
    assert [line for line in lines if line.startswith("USER")] == ["USER passion"]
    assert any(line.startswith("HEALTHCHECK") for line in lines)
