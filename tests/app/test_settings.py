import os
import subprocess
import sys

import pytest
from pydantic import ValidationError

from app.jobs.settings import Settings, packaged_checkpoints


def test_every_setting_is_read_from_its_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("PASSION_STORE", str(tmp_path))
    monkeypatch.setenv("PASSION_MAX_FILE_BYTES", "12345")
    monkeypatch.setenv("PASSION_DEVICE", "cuda:1")
    settings = Settings()
    assert (settings.store, settings.max_file_bytes, settings.device) == (tmp_path, 12345, "cuda:1")


def test_redis_is_read_from_either_variable_and_ours_wins(monkeypatch):
    monkeypatch.delenv("PASSION_REDIS_URL", raising=False)
    monkeypatch.setenv("REDIS_URL", "redis://one/0")
    assert Settings().redis_url == "redis://one/0"
    monkeypatch.setenv("PASSION_REDIS_URL", "redis://two/0")
    assert Settings().redis_url == "redis://two/0"


def test_an_empty_variable_is_as_none(monkeypatch):
    monkeypatch.setenv("PASSION_PORT", "")
    assert Settings().port == 8000


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PASSION_HARD_TIME_LIMIT", "10", "PASSION_HARD_TIME_LIMIT must be longer"),
        ("PASSION_MAX_REQUEST_BYTES", "10", "PASSION_MAX_FILE_BYTES must not be larger"),
        ("PASSION_MIN_SPACING", "30", "PASSION_MIN_SPACING must be smaller"),
        ("PASSION_MAX_ATTEMPTS", "0", "greater than or equal to 1"),
        ("PASSION_DEVICE", "gpu", "should match pattern"),
        ("PASSION_PORT", "http", "valid integer"),
    ],
)
def test_what_cannot_be_right_is_refused_at_once(monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match=words):
        Settings()


def test_a_child_process_reads_the_same_settings(monkeypatch, tmp_path):
    monkeypatch.delenv("REDIS_URL", raising=False)
    parent = Settings(redis_url="redis://x/3", store=tmp_path, port=1234, max_attempts=7, default_model="m")
    for name, value in parent.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == parent


def test_the_packaged_checkpoints_are_found_without_importing_models():
    code = (
        "import sys; from app.jobs.settings import Settings; print(Settings().models);"
        "assert not {'models', 'torch'} & set(sys.modules)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PASSION_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == str(packaged_checkpoints())
    assert packaged_checkpoints().parts[-2:] == ("models", "checkpoints")
