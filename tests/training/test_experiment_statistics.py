"""Comparisons over subjects against figures worked out by hand, and the tables and report made of them."""

import csv
import math

import pytest
from scipy import stats

from training.experiments import files, tables
from training.experiments.collect import Curve, Results, Score
from training.experiments.folder import ResultsFolder
from training.experiments.grid import Cell, cells
from training.experiments.outcome import AVERAGE, Outcome
from training.experiments.report import write
from training.experiments.statistics import Comparison, compare, holm, mean, slope

NAN = float("nan")


def test_a_comparison_by_hand():
    found = compare([1, 2, 3, 4, 5, 6, 7, 8, NAN])
    assert found.n == 8
    assert found.mean == pytest.approx(4.5)
    # All signs alike: 2 of the 2^8 ways to give signs are as extreme.
    assert found.p == pytest.approx(2 / 256)
    # Squares about the mean sum to 42, over 7 that is a variance of 6; Student's t for 7 degrees of freedom 2.364624.
    assert found.low == pytest.approx(4.5 - 2.364624 * math.sqrt(6 / 8), abs=1e-5)
    assert found.high == pytest.approx(4.5 + 2.364624 * math.sqrt(6 / 8), abs=1e-5)


def test_subjects_without_a_difference_count_for_the_mean_and_not_for_the_test():
    found = compare([0, 0, 0.5, -0.1, 0.2, 0.3, 0.4, 0.6])
    assert found.n == 8
    assert found.mean == pytest.approx(1.9 / 8)
    # Ranks 1 (negative) and 2 to 6: W = 1; 2 * P(W <= 1) = 2 * 2 / 2^6.
    assert found.p == pytest.approx(4 / 64)
    assert found.p == pytest.approx(stats.wilcoxon([0.5, -0.1, 0.2, 0.3, 0.4, 0.6]).pvalue)


def test_too_few_subjects_have_no_test():
    assert compare([]) == Comparison(0, None, None, None, None)
    assert compare([NAN, 0.5, 0.7, 0.1, 0.2, 0.3]) == Comparison(5, pytest.approx(0.36), None, None, None)
    few_differ = compare([0, 0, 0, 0.1, 0.2])
    assert few_differ.p is None
    same = compare([0.0] * 10)
    assert (same.mean, same.p) == (0, None)


def test_holm_by_hand():
    family = [Comparison(9, 0.1, 0, 0, p) for p in (0.01, 0.04, 0.03, None, 0.005)]
    # In order 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1, and never less than the one before.
    expected = [0.03, 0.06, 0.06, None, 0.02]
    assert [c.p_holm for c in holm(family)] == [e if e is None else pytest.approx(e) for e in expected]
    assert holm([Comparison(9, 0.1, 0, 0, 0.7)] * 3)[0].p_holm == 1


def test_slope_and_mean_by_hand():
    rates = {"t1": 0.2, "t1ce": 0.4, "flair": 0.6, "t2": 0.8}
    assert slope(rates, {"t1": 1.0, "t1ce": 2.0, "flair": 3.0, "t2": 4.0}) == pytest.approx(5)
    assert slope(rates, {"t1": 0.0, "t1ce": 0.0, "flair": 0.0, "t2": 1.0}) == pytest.approx(0.3 / 0.2)
    assert math.isnan(slope(rates, {"t1": 1.0, "t1ce": 2.0, "flair": 3.0, "t2": NAN}))
    assert math.isnan(slope(dict.fromkeys(rates, 0.5), dict.fromkeys(rates, 1.0)))
    assert mean([1.0, NAN, 2.0]) == 1.5
    assert math.isnan(mean([NAN]))


SUBSETS = (("flair",), ("t1ce",), ("t1",), ("t2",), ("flair", "t2"))
RATES = {"t1": 0.2, "t1ce": 0.4, "flair": 0.6, "t2": 0.8}


@pytest.fixture
def definition(tmp_path):
    path = tmp_path / "made.yaml"
    path.write_text(
        """
name: made
description: Figures made up by a test.
data: {task: glioma-4mm, phantom: {subjects: 5, seed: 1, test: {subjects: 8, seed: 2}}}
imbalances: [mr2468, mr1379]
backbones: [rfnet]
arms: [{name: baseline}, {name: PASSION, method: passion}, {name: complete, regime: pdt}]
seeds: [1, 2]
"""
    )
    return files.read(path)


def score(cell, subject, subset, region):
    """Dice 0.5 for all, but: seed 2 has 0.2 more; PASSION gains its modality's rate / 10, times 1 + subject / 100."""
    gain = RATES[subset[0]] / 10 * (1 + subject / 100) if cell.arm == "PASSION" and len(subset) == 1 else 0
    dice = 0.5 + 0.2 * (cell.seed == 2) + gain + 0.1 * (cell.arm == "complete")
    hd95 = NAN if (region, subject, cell.seed) == ("ET", 0, 2) else 10.0 * cell.seed
    return Score(cell, f"case{subject}", subset, region, dice, hd95)


@pytest.fixture
def results(definition):
    there = [c for c in cells(definition) if c != Cell("rfnet", "mr2468", "PASSION", 2)]
    scores = [
        score(c, subject, subset, region)
        for c in there
        for subject in range(8)
        for subset in SUBSETS
        for region in ("WT", "TC", "ET", "ET_pp")
    ]
    curves = [
        Curve(c, epoch, name, 1.0 / (epoch + 1), *((0.3, 1.1) if c.arm == "PASSION" else (None, None)))
        for c in there
        for epoch in range(3)
        for name in RATES
    ]
    runs = [
        c.as_dict()
        | {"method": "none", "regime": "idt", "subjects": 5, "epochs": 3, "training_seconds": 120.0}
        | {"evaluation_seconds": 30.0, "device": "CPU, 1 threads", "threads": 1, "command": "passion experiment made"}
        | {"software": {"python": "3.12", "torch": "2"}, "finished": "2026-01-02T03:04:05Z"}
        | {"machine": {"processor": "abacus", "cores": 2, "memory_gb": 8.0, "gpus": [], "system": "Linux"}}
        | {"code": {"commit": "abc", "dirty": True}}
        for c in there
    ]
    splits = [{"imbalance": i, "seed": s, "subjects": 5, "rates": RATES} for i in ("mr2468", "mr1379") for s in (1, 2)]
    return Results(scores, curves, runs, splits)


def test_an_outcome_takes_seeds_first_and_compares_common_seeds(definition, results):
    outcome = Outcome(definition, results, "rfnet", "mr2468", "dice")
    assert outcome.arms == ["baseline", "PASSION", "complete"]
    assert outcome.seeds == {"baseline": [1, 2], "PASSION": [1], "complete": [1, 2]}
    assert outcome.subsets == list(SUBSETS)
    assert outcome.value("baseline", ("t2",), "WT") == pytest.approx(0.6)
    assert outcome.by_seed("baseline") == pytest.approx([0.5, 0.7])
    assert outcome.value("complete", None, AVERAGE) == pytest.approx(0.7)
    # PASSION's second seed is missing, so it is compared with the baseline's first alone.
    assert outcome.differences("PASSION", ("t2",), "WT") == pytest.approx([0.08 * (1 + s / 100) for s in range(8)])
    assert outcome.seeds_in_favour("PASSION") == (1, 1)
    assert outcome.seeds_in_favour("complete") == (2, 2)


def test_the_other_imbalance_has_the_same_complete_arm(definition, results):
    outcome = Outcome(definition, results, "rfnet", "mr1379", "dice")
    assert outcome.seeds == {"baseline": [1, 2], "PASSION": [1, 2], "complete": [1, 2]}
    assert outcome.value("complete", None, AVERAGE) == pytest.approx(0.7)


def test_gains_are_told_by_missing_rate(definition, results):
    outcome = Outcome(definition, results, "rfnet", "mr2468", "dice")
    rows = [row for row in outcome.by_modality() if row.arm == "PASSION"]
    assert [row.subset[0] for row in rows] == ["t2", "flair", "t1ce", "t1"]
    assert [row.comparison.mean for row in rows] == pytest.approx([r * 0.1 * 1.035 for r in (0.8, 0.6, 0.4, 0.2)])
    # All 8 subjects gain: p = 2 / 2^8 for each; 8 tests, of which the complete arm's 4 are as sure.
    assert all(row.comparison.p_holm == pytest.approx(8 * 2 / 256) for row in rows)
    assert outcome.trend("PASSION").mean == pytest.approx(0.1035)
    assert outcome.trend("complete").mean == pytest.approx(0)


def test_undefined_distances_are_left_out_and_counted(definition, results):
    outcome = Outcome(definition, results, "rfnet", "mr2468", "hd95")
    # Subject 0 has no ET in seed 2: its own mean is seed 1's 10, the others' 15.
    assert outcome.value("baseline", ("t2",), "ET") == pytest.approx((10 + 7 * 15) / 8)
    assert outcome.value("baseline", ("t2",), AVERAGE) == pytest.approx((15 + 15 + (10 + 7 * 15) / 8) / 3)
    assert outcome.defined("baseline") == pytest.approx(1 - 1 / (8 * 3 * 2))
    assert outcome.differences("complete", ("t2",), "ET") == pytest.approx([0.0] * 8)


@pytest.mark.slow
def test_a_report_tells_what_was_run_what_came_out_and_what_is_missing(definition, results, tmp_path):
    folder = ResultsFolder(tmp_path / "results")
    folder.path.mkdir()
    (folder.path / "notes.md").write_text("Nothing to see here.\n")
    path = write(definition, folder, results)
    text = path.read_text()
    for expected in (
        "Nothing to see here.",
        "passion experiment made",
        "commit: `abc`, with changes that are not committed",
        "abacus, 2 cores",
        "**1 of 10 cells are missing**",
        "- rfnet, mr2468, PASSION, seed 2",
        "| rfnet | PASSION | `passion`, `idt` | 3 | 3 | 5 | 2.0 | 0.5 |",
        "| mr1379 | 2 | 5 | 0.600 | 0.400 | 0.200 | 0.800 |",
        "| ○ | ○ | ○ | ● | 0.600 | 0.583 | 0.700 |",
        "| t2 | 0.800 | 0.600 | 0.583 | 0.700 | +0.083 [+0.081, +0.084] p 0.062 | +0.100 [+0.100, +0.100] p 0.062 |",
        "Values that are defined: baseline 97.9 %",
    ):
        assert expected in text
    for line in text.splitlines():
        if line.startswith("!["):
            picture = folder.path / line.split("(")[1].rstrip(")")
            assert picture.read_bytes().startswith(b"\x89PNG")
    assert text.count("![") == 6

    made = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    write(definition, folder, results)
    assert {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()} == made

    with (folder.path / "tables" / "all.csv").open(newline="") as file:
        rows = [
            r for r in csv.DictReader(file) if (r["metric"], r["arm"], r["imbalance"]) == ("dice", "PASSION", "mr1379")
        ]
    assert len(rows) == (len(SUBSETS) + 1) * 5
    row = next(r for r in rows if (r["modalities"], r["region"]) == ("t2", "WT"))
    assert float(row["mean"]) == pytest.approx(0.6828)
    assert float(row["difference"]) == pytest.approx(0.0828)
    assert (row["subjects"], float(row["p"])) == ("8", pytest.approx(2 / 256, rel=1e-4))


def test_many_arms_get_a_table_per_region(definition, results):
    outcome = Outcome(definition, results, "rfnet", "mr2468", "dice")
    assert tables.per_subset(outcome).count("| all |") == 1
    outcome.arms = [*outcome.arms, "baseline"]
    split = tables.per_subset(outcome)
    assert split.count("| all |") == 5
    assert "| flair | t1ce | t1 | t2 | ET baseline | ET PASSION | ET complete | ET baseline |" in split


def test_numbers_without_a_value_are_dashes(definition, results):
    outcome = Outcome(definition, results, "rfnet", "mr2468", "dice")
    assert tables.number(outcome, NAN) == "-"
    assert tables.difference(outcome, compare([])) == "-"
    assert tables.difference(outcome, compare([0.1, 0.2])) == "+0.150"
    assert tables.difference(outcome, compare([0.0] * 8)) == "+0.000 [+0.000, +0.000] p -"
