"""`passion split`: drawn and published splits, and the command that writes them with a missingness table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from models.task import Task
from training import published
from training.cli import app
from training.errors import UserError
from training.missingness import MissingnessTable
from training.splits import Names, Split, cut_to_available, parse_rates

GLIOMA = Task.load("glioma")
FILES = ["missingness.csv", "test.txt", "train.txt", "val.txt"]


def names(count: int) -> list[str]:
    return [f"case{i:03d}" for i in range(count)]


def published_ids() -> list[str]:
    """The 369 subjects of BraTS 2020 as their folders are called: without the grade that the lists put in front."""
    return sorted(n[3:] for n in published.subjects())


def prepared(folder: Path, ids: list[str], lacking: dict[str, tuple[str, ...]] | None = None) -> Path:
    """What `passion split` reads of a prepared data set."""
    for name in ids:
        (folder / name).mkdir(parents=True)
        has = [m for m in GLIOMA.names if m not in (lacking or {}).get(name, ())]
        numbers = dict.fromkeys(has, 1.0)
        record = {"id": name, "modalities": has, "shape": [4, 4, 4], "mean": numbers, "std": numbers}
        (folder / name / "case.json").write_text(json.dumps(record))
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
    split = Split.read(published.FOLDER, published_ids())
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
    fitted = cut_to_available(masks, {"a": (True, False), "b": (False, True), "c": (True, True)})
    assert fitted.masks == {"a": (True, False), "b": (False, True), "c": (False, True)}
    assert (fitted.cut, fitted.kept) == (("a",), ("b",))


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
    table = published.FOLDER / "mr2468.csv"
    result = run(data, "--out", tmp_path / "split", "--lists", published.FOLDER, "--table", table)
    assert result.exit_code == 0, result.output
    ours = MissingnessTable.read(tmp_path / "split" / "missingness.csv", GLIOMA)
    theirs = MissingnessTable.read(table, GLIOMA)
    assert list(ours.masks) == [name[3:] for name in theirs.masks]
    assert list(ours.masks.values()) == list(theirs.masks.values())
    assert "0.589" in result.output  # flair, of 219
    assert run(data, "--out", tmp_path / "short", "--published", "mr2468").exit_code == 0
    for name in FILES:
        assert (tmp_path / "short" / name).read_bytes() == (tmp_path / "split" / name).read_bytes()
    drawn = run(data, "--out", tmp_path / "drawn", "--preset", "mr2468")
    assert "--published mr2468 takes the released" in drawn.output
    assert (tmp_path / "drawn" / "train.txt").read_bytes() != (tmp_path / "split" / "train.txt").read_bytes()


@pytest.mark.parametrize(
    ("ids", "options", "said"),
    [
        (slice(3, None), ["mr2468"], r"lacks 3 of BraTS2020's 369 subjects, such as .*BraTS20_Training_00\d"),
        (slice(None), ["mr2469"], "choose one of mr1379, mr2258"),
        (slice(None), ["mr2468", "--preset", "mr2468"], "exclude one another"),
        (slice(None), ["mr2468", "--lists", "x"], "leave --lists out"),
    ],
)
def test_published_for_what_it_does_not_fit(tmp_path, ids, options, said):
    data = prepared(tmp_path / "data", published_ids()[ids])
    assert re.search(said, refused(data, "--out", tmp_path / "split", "--published", *options))
    assert not (tmp_path / "split").exists()


def test_published_is_of_the_four_glioma_modalities():
    with pytest.raises(UserError, match=r"of flair, t1ce, t1, t2, and task prostate has t2, adc; use --missing"):
        published.load("mr2468", Task.load("prostate"), published_ids())


def test_a_table_for_other_subjects_is_refused(tmp_path):
    table = published.FOLDER / "mr2468.csv"
    data = prepared(tmp_path / "data", published_ids())
    assert "give the split that belongs" in refused(data, "--out", tmp_path / "s", "--table", table)
    data = prepared(tmp_path / "few", published_ids()[:20])
    assert "is no subject of the data set" in refused(data, "--out", tmp_path / "s", "--table", table)
    assert not (tmp_path / "s").exists()


def row(output: str, modality: str) -> list[str]:
    """The cells of a modality in the printed table."""
    line = next(line for line in output.splitlines() if re.match(rf"│ {modality} ", line))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_without_rates_the_table_is_what_the_files_say(tmp_path):
    data = prepared(tmp_path / "data", names(10), lacking={"case004": ("t2",), "case005": ("flair", "t2")})
    result = run(data, "--out", tmp_path / "split", "--val", "0", "--test", "0")
    assert result.exit_code == 0, result.output
    masks = MissingnessTable.read(tmp_path / "split" / "missingness.csv", GLIOMA).masks
    assert masks.pop("case004") == (True, True, True, False)
    assert masks.pop("case005") == (False, True, True, False)
    assert all(all(mask) for mask in masks.values())
    assert "2 training subjects lack a modality's file" in result.output
    assert "dealt" not in result.output
    # modality, asked, expected, realised, have it, no file, left out, weight
    assert row(result.output, "t2") == ["t2", "", "", "0.200", "8", "2", "0", "1.250"]


def test_rates_are_dealt_on_top_of_what_the_files_say(tmp_path):
    ids = names(40)
    lacking = dict.fromkeys(ids[:10], ("t1", "t1ce")) | dict.fromkeys(ids[10:14], ("t1ce", "t1", "t2"))
    data = prepared(tmp_path / "data", ids, lacking=lacking)
    whole = prepared(tmp_path / "whole", ids)
    options = ("--missing", "flair=0.5,t2=0.5", "--val", "0", "--test", "0")
    result = run(data, "--out", tmp_path / "split", *options)
    assert result.exit_code == 0, result.output
    assert run(whole, "--out", tmp_path / "dealt", *options).exit_code == 0
    masks = MissingnessTable.read(tmp_path / "split" / "missingness.csv", GLIOMA).masks
    dealt = MissingnessTable.read(tmp_path / "dealt" / "missingness.csv", GLIOMA).masks
    kept = cut = 0
    for name in ids:
        has = tuple(m not in lacking.get(name, ()) for m in GLIOMA.names)
        both = tuple(a and b for a, b in zip(dealt[name], has, strict=True))
        assert masks[name] == (both if any(both) else has)
        kept += not any(both)
        cut += any(both) and both != dealt[name]
    assert kept  # of the subjects with one or two files some were dealt neither
    assert f"{cut} were dealt a modality that they have no file of" in result.output
    assert f"{kept} have no file of anything they were dealt" in result.output
    modality, asked, expected, _, have, no_file, left_out, _ = row(result.output, "t2")
    assert (modality, asked, no_file) == ("t2", "0.500", "4")
    assert pytest.approx(float(expected), abs=0.01) == 0.5
    assert int(have) + int(no_file) + int(left_out) == 40


def test_a_modality_that_no_file_holds_is_refused(tmp_path):
    data = prepared(tmp_path / "data", names(5), lacking=dict.fromkeys(names(5), ("t1",)))
    assert "has t1: lower its missing rate, or take it out" in refused(data, "--out", tmp_path / "split")
    assert not (tmp_path / "split").exists()


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
    (tmp_path / "raw" / "Phantom_0004").mkdir()
    (tmp_path / "raw" / "Phantom_0004" / "Phantom_0004_seg.nii.gz").write_bytes(b"")
    result = run(tmp_path / "raw", "--out", tmp_path / "split", "--val", "0", "--test", "0")
    assert result.exit_code == 0, result.output
    masks = MissingnessTable.read(tmp_path / "split" / "missingness.csv", GLIOMA).masks
    assert np.array_equal(list(masks.values()), [[1, 1, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1]])
    assert "1 left out, for they cannot be used; Phantom_0004: no modality, only labels" in result.output
    assert "no scans found" in refused(tmp_path / "split", "--out", tmp_path / "other")
