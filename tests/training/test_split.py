"""`passion split`: drawn and published splits, and the command that writes them with a missingness table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from models.task import Task
from training.cli import app
from training.errors import UserError
from training.missingness import MissingnessTable
from training.splits import Names, Split, cut_to_available, parse_rates

SPLITS = Path(__file__).parents[1] / "golden" / "splits"
GLIOMA = Task.load("glioma")
FILES = ["missingness.csv", "test.txt", "train.txt", "val.txt"]


def names(count: int) -> list[str]:
    return [f"case{i:03d}" for i in range(count)]


def published_ids() -> list[str]:
    """The 369 subjects of BraTS 2020 as their folders are called: without the grade that the lists put in front."""
    listed = [n for part in ("train", "val", "test") for n in (SPLITS / f"{part}.txt").read_text().split()]
    return sorted(n[3:] for n in listed)


def prepared(folder: Path, ids: list[str], lacking: dict[str, str] | None = None) -> Path:
    """What `passion split` reads of a prepared data set."""
    for name in ids:
        (folder / name).mkdir(parents=True)
        has = [m for m in GLIOMA.names if m != (lacking or {}).get(name)]
        (folder / name / "case.json").write_text(json.dumps({"id": name, "modalities": has}))
    content = {"schema_version": 1, "task": GLIOMA.model_dump(mode="json"), "cases": ids}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def run(*arguments: object):
    return CliRunner().invoke(app, ["split", *map(str, arguments)], env={"COLUMNS": "160"})


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, UserError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_a_drawn_split_is_a_partition_by_seed():
    split = Split.draw(names(40), 0.1, 8, 1037)
    assert (len(split.train), len(split.val), len(split.test)) == (28, 4, 8)
    assert sorted(split.train + split.val + split.test) == names(40)
    assert split == Split.draw(names(40)[::-1], 0.1, 8, 1037)
    assert split != Split.draw(names(40), 0.1, 8, 1038)


@pytest.mark.parametrize(("val", "test"), [(0.5, 0.5), (2, 8), (-1, 0), (1.5, 0), (30, 0)])
def test_impossible_amounts(val, test):
    with pytest.raises(UserError, match=r"--val|--test"):
        Split.draw(names(10), val, test, 1)


def test_the_published_split_fits_the_folders_of_brats():
    split = Split.read(SPLITS, published_ids())
    assert (len(split.train), len(split.val), len(split.test)) == (219, 50, 100)
    assert split.train[0] == "BraTS20_Training_002"


def test_names_match_exactly_first_and_never_by_guess():
    found = Names(["HG_a", "a", "HGG_b", "LGG_b"])
    assert found.match("HG_a") == "HG_a"
    assert found.match("a") == "a"
    assert found.match("b") is None  # which one?
    assert found.match("c") is None
    assert Names(["b"]).match("LGG_b") == "b"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("val.txt", "case003\nnobody\n"), "val.txt, line 2: nobody is no subject"),
        (("val.txt", "case001\n"), "val.txt, line 1: case001 stands in train.txt already"),
        (("train.txt", "\n"), "train.txt: lists no subject"),
        (("test.txt", None), "test.txt: cannot read"),
    ],
)
def test_bad_lists(tmp_path, change, said):
    Split(("case001", "case002"), ("case003",), ("case004",)).write(tmp_path)
    if change[1] is None:
        (tmp_path / change[0]).unlink()
    else:
        (tmp_path / change[0]).write_text(change[1])
    with pytest.raises(UserError, match=said):
        Split.read(tmp_path, names(10))


def test_lists_round_trip(tmp_path):
    split = Split(("case001", "case002"), ("case003",), ())
    split.write(tmp_path)
    assert Split.read(tmp_path, names(5)) == split


def test_rates_are_parsed():
    assert parse_rates("t1=0.2, flair=.6") == {"t1": 0.2, "flair": 0.6}
    for text in ("t1", "t1=x", "", "t1=0.1,t1=0.2"):
        with pytest.raises(UserError, match="--missing"):
            parse_rates(text)


def test_masks_promise_nothing_that_is_not_there():
    masks = {"a": (True, True), "b": (True, False), "c": (False, True)}
    fitted, changed = cut_to_available(masks, {"a": (True, False), "b": (False, True), "c": (True, True)})
    assert fitted == {"a": (True, False), "b": (False, True), "c": (False, True)}
    assert changed == 2


def test_the_command_draws_split_and_table(tmp_path):
    data = prepared(tmp_path / "data", names(60))
    result = run(data, "--out", tmp_path / "split", "--preset", "mr2468", "--val", "5", "--test", "0.25")
    assert result.exit_code == 0, result.output
    assert "40 train, 5 val, 15 test" in result.output
    assert sorted(p.name for p in (tmp_path / "split").iterdir()) == FILES
    split = Split.read(tmp_path / "split", names(60))
    table = MissingnessTable.read(tmp_path / "split" / "missingness.csv", GLIOMA, known=split.train)
    assert set(table.masks) == set(split.train)
    rates = table.rates()
    assert rates["t1"] < rates["t1ce"] < rates["flair"] < rates["t2"]
    again = run(
        data, "--out", tmp_path / "again", "--missing", "t1=0.2,t1c=0.4,t2f=0.6,t2w=0.8", "--val", "5", "--test", 15
    )
    assert again.exit_code == 0, again.output
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "split" / name).read_bytes()


def test_without_rates_nothing_is_missing(tmp_path):
    data = prepared(tmp_path / "data", names(10))
    assert run(data, "--out", tmp_path / "split").exit_code == 0
    table = MissingnessTable.read(tmp_path / "split" / "missingness.csv", GLIOMA)
    assert all(all(mask) for mask in table.masks.values())


def test_published_lists_and_table_under_the_data_sets_names(tmp_path):
    data = prepared(tmp_path / "data", published_ids())
    published = SPLITS / "Brats2020_imb_split_mr2468.csv"
    result = run(data, "--out", tmp_path / "split", "--lists", SPLITS, "--table", published)
    assert result.exit_code == 0, result.output
    ours = MissingnessTable.read(tmp_path / "split" / "missingness.csv", GLIOMA)
    theirs = MissingnessTable.read(published, GLIOMA)
    assert list(ours.masks) == [name[3:] for name in theirs.masks]
    assert list(ours.masks.values()) == list(theirs.masks.values())
    assert "0.589" in result.output  # flair, of 219


def test_a_table_for_other_subjects_is_refused(tmp_path):
    published = SPLITS / "Brats2020_imb_split_mr2468.csv"
    data = prepared(tmp_path / "data", published_ids())
    assert "give the split that belongs" in refused(data, "--out", tmp_path / "s", "--table", published)
    data = prepared(tmp_path / "few", published_ids()[:20])
    assert "is no subject of the data set" in refused(data, "--out", tmp_path / "s", "--table", published)
    assert not (tmp_path / "s").exists()


def test_modalities_that_are_not_there_are_not_dealt(tmp_path):
    data = prepared(tmp_path / "data", names(10), lacking={"case004": "t2", "case005": "flair"})
    result = run(data, "--out", tmp_path / "split", "--val", "0", "--test", "0")
    assert result.exit_code == 0, result.output
    assert "2 subjects lack" in result.output
    masks = MissingnessTable.read(tmp_path / "split" / "missingness.csv", GLIOMA).masks
    assert masks["case004"] == (True, True, True, False)
    assert masks["case005"] == (False, True, True, True)


def test_a_split_is_not_replaced_unasked(tmp_path):
    data = prepared(tmp_path / "data", names(10))
    assert run(data, "--out", tmp_path / "split").exit_code == 0
    before = (tmp_path / "split" / "train.txt").read_bytes()
    assert "--overwrite" in refused(data, "--out", tmp_path / "split", "--seed", "2")
    assert (tmp_path / "split" / "train.txt").read_bytes() == before
    assert run(data, "--out", tmp_path / "split", "--seed", "2", "--overwrite").exit_code == 0
    assert (tmp_path / "split" / "train.txt").read_bytes() != before


@pytest.mark.parametrize(
    "options",
    [
        ["--missing", "t1=0.2", "--preset", "mr2468"],
        ["--missing", "pet=0.2"],
        ["--missing", "t1=1"],
        ["--preset", "mr24"],
        ["--val", "0.5", "--test", "0.5"],
        ["--lists", "nowhere"],
        ["--table", "nowhere.csv"],
    ],
)
def test_bad_options_write_nothing(tmp_path, options):
    data = prepared(tmp_path / "data", names(10))
    refused(data, "--out", tmp_path / "split", *options)
    assert not (tmp_path / "split").exists()


def test_a_raw_folder_will_do(tmp_path):
    from training.phantom import make_subject, write_subject

    for index in (1, 2, 3):
        write_subject(tmp_path / "raw", make_subject(3, index, (40, 40, 26), 6.0))
    (tmp_path / "raw" / "Phantom_0002" / "Phantom_0002_t1.nii.gz").unlink()
    result = run(tmp_path / "raw", "--out", tmp_path / "split", "--val", "0", "--test", "0")
    assert result.exit_code == 0, result.output
    masks = MissingnessTable.read(tmp_path / "split" / "missingness.csv", GLIOMA).masks
    assert np.array_equal(list(masks.values()), [[1, 1, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1]])
    assert "no scans found" in refused(tmp_path / "split", "--out", tmp_path / "other")
