"""`passion info`: what there is, without loading it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from models.card import PACKAGED
from training.automatic import GPU_FILES, automatic_device
from training.cli import app
from training.device import choose_device
from training.errors import UserError


def run(*arguments):
    return CliRunner().invoke(app, ["info", *map(str, arguments)], env={"COLUMNS": "160"})


def test_the_packaged_models_in_full():
    result = run("--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["software"].keys() >= {"passion-seg", "torch"}
    assert said["broken"] == []
    (model,) = said["models"]
    card = json.loads((PACKAGED / "glioma-phantom-rfnet" / "card.json").read_text())
    assert (model["name"], model["backbone"], model["task"]) == ("glioma-phantom-rfnet", "rfnet", "glioma-4mm")
    assert model["modalities"] == card["task"]["modalities"]
    assert model["labels"] == card["task"]["labels"]
    assert model["regions"][1]["labels"] == ["necrotic core", "enhancing tumour"]
    assert model["scores"] == card["scores"]
    assert model["weights_sha256"] == card["weights_sha256"]
    assert model["weights_bytes"] > 0
    assert said["device"] == automatic_device()


def test_people_get_a_table(small_checkpoint):
    result = run(small_checkpoint)
    assert result.exit_code == 0, result.output
    for words in ("t1ce (also t1c, t1gd)", "4 (or 3): enhancing tumour", "TC: necrotic core, enhancing tumour"):
        assert words in result.output
    for words in ("rfnet, width 8", "50% of the training subjects", "0.750", "Not a medical device", "device auto is"):
        assert words in result.output


def test_weights_are_not_read(small_checkpoint, tmp_path):
    model = shutil.copytree(small_checkpoint, tmp_path / "model")
    (model / "weights.safetensors").write_bytes(b"no weights")
    assert json.loads(run(model, "--json").stdout)["models"][0]["weights_bytes"] == len(b"no weights")
    (model / "weights.safetensors").unlink()
    assert "weights.safetensors IS MISSING" in run(model).output


def test_a_broken_card_beside_a_good_one(small_checkpoint, tmp_path):
    shutil.copytree(small_checkpoint, tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "card.json").write_text('{"name": "bad"}')
    result = run(tmp_path, "--json")
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert [m["folder"] for m in said["models"]] == [str(tmp_path / "good")]
    assert said["broken"][0].startswith(f"{tmp_path}/bad/card.json: task: Field required")


@pytest.mark.parametrize(("place", "message"), [("none", "no such folder"), ("", "no card.json in it")])
def test_a_folder_without_models(tmp_path, place, message):
    result = run(tmp_path / place)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)


def test_a_broken_card_alone_is_one_line(tmp_path):
    (tmp_path / "card.json").write_text("{")
    result = run(tmp_path)
    assert isinstance(result.exception, UserError)
    assert "\n" not in str(result.exception)


def test_it_is_quick_because_torch_stays_out():
    code = (
        "import sys; from training.cli import app\n"
        "try: app(['info', '--json'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    may_have_gpu = any(Path(file).exists() for file in GPU_FILES)
    assert done.stderr.strip() == str(may_have_gpu)


def test_the_device_is_that_which_auto_takes():
    assert automatic_device().split(" ")[0] == str(choose_device("auto"))
