"""The missingness table: the published ones, ours, and what is wrong with a bad one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.task import Task
from training import published
from training.errors import UserError
from training.missingness import (
    MissingnessTable,
    apportion,
    assign,
    expected_shares,
    mask_ids,
    modality_weights,
    preset,
    sub_subset_ids,
)

PUBLISHED = sorted(published.FOLDER.glob("*.csv"))
GLIOMA = Task.load("glioma")
CARDIAC = Task.model_validate(
    {
        "name": "cardiac",
        "modalities": [{"name": "bssfp"}, {"name": "lge"}, {"name": "t2"}],
        "labels": [{"name": "background", "value": 0}, {"name": "scar", "value": 1}],
        "regions": [{"name": "scar", "labels": [1]}],
        "patch_size": [16, 16, 16],
        "spacing": [1, 1, 1],
    }
)


def names(count: int) -> list[str]:
    return [f"case{i:03d}" for i in range(count)]


def present(table: MissingnessTable, modality: str) -> int:
    k = table.names.index(modality)
    return sum(mask[k] for mask in table.masks.values())


def test_all_eight_published_tables_are_here():
    eight = ("mr1379", "mr2258", "mr2285", "mr2468", "mr5528", "mr5582", "mr8825", "mr8852")
    assert eight == published.IMBALANCES
    assert [path.stem for path in PUBLISHED] == list(eight)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_published_tables_round_trip_to_the_byte(path, tmp_path):
    table = MissingnessTable.read(path, GLIOMA)
    assert tuple(table.masks) == tuple((published.FOLDER / "train.txt").read_text().split())
    table.write(tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_published_names_give_the_rates_of_t1_t1ce_flair_t2(path):
    """The digits are in the order t1, t1ce, flair, t2, and the rates those given that something is present."""
    table = MissingnessTable.read(path, GLIOMA)
    rates = preset(path.stem, GLIOMA)
    subsets = list(mask_ids(GLIOMA))
    shares = expected_shares([rates[n] for n in GLIOMA.names], subsets)
    for k, (name, realised) in enumerate(table.rates().items()):
        expected = 1 - sum(p for p, mask in zip(shares, subsets, strict=True) if mask[k])
        assert realised == pytest.approx(expected, abs=0.021), name
        assert realised == pytest.approx(rates[name], abs=0.07), name


def test_numbers_of_the_glioma_subsets_are_the_published_ones():
    ids = {
        "+".join(n for n, has in zip(GLIOMA.names, mask, strict=True) if has): i for mask, i in mask_ids(GLIOMA).items()
    }
    order = (
        "t2 | t1ce | t1 | flair | t1ce+t2 | t1ce+t1 | flair+t1 | t1+t2 | flair+t2 | flair+t1ce | "
        "flair+t1ce+t1 | flair+t1+t2 | flair+t1ce+t2 | t1ce+t1+t2 | flair+t1ce+t1+t2"
    )
    assert ids == {subset.strip(): i for i, subset in enumerate(order.split("|"))}


def test_other_tasks_number_their_subsets_by_size_and_order():
    ids = mask_ids(CARDIAC)
    assert list(ids) == [CARDIAC.mask(subset) for subset in CARDIAC.subsets()]
    assert list(ids.values()) == list(range(7))
    assert sub_subset_ids((True, False, True), ids) == [0, 2, 4]


@settings(max_examples=300, deadline=None)
@given(
    total=st.integers(1, 400),
    rates=st.lists(
        st.sampled_from([0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97]), min_size=2, max_size=5
    ),
)
def test_every_modality_is_within_one_subject_of_its_expectation(total, rates):
    count = len(rates)
    subsets = [tuple(bool(b >> k & 1) for k in range(count)) for b in range(1, 2**count)]
    counts = apportion(total, np.array(rates), subsets)
    assert sum(counts) == total
    assert min(counts) >= 0
    wanted = np.array(subsets).T @ (total * expected_shares(rates, subsets))
    realised = np.array(subsets).T @ np.array(counts)
    assert (np.abs(realised - wanted) < 1 + 1e-6).all()
    assert (realised >= 1).all()


def test_assignment_follows_the_seed_and_not_the_order_of_ids():
    rates = preset("mr2468", GLIOMA)
    first = assign(names(50), rates, GLIOMA, 1037)
    assert first.masks == assign(names(50)[::-1], rates, GLIOMA, 1037).masks
    other = assign(names(50), rates, GLIOMA, 1)
    assert other.masks != first.masks
    assert other.counts() == first.counts()
    assert set(first.masks) == set(names(50))


def test_assignment_at_the_published_size():
    table = assign(names(219), preset("mr2468", GLIOMA), GLIOMA, 1037)
    # 219 subjects, each rate given that something is present: .8/.9616, .6/.9616, .4/.9616, .2/.9616
    for modality, rate in (("t1", 0.8), ("t1ce", 0.6), ("flair", 0.4), ("t2", 0.2)):
        assert abs(present(table, modality) - 219 * rate / (1 - 0.2 * 0.4 * 0.6 * 0.8)) < 1


def test_a_modality_not_named_is_never_missing():
    table = assign(names(20), {"t2f": 0.5}, GLIOMA, 1)  # an alias of flair
    assert table.rates() == {"flair": 0.5, "t1ce": 0, "t1": 0, "t2": 0}


def test_weights_are_subjects_over_subjects_that_have_it():
    table = MissingnessTable(("bssfp", "lge", "t2"), {"a": (True, True, False), "b": (True, False, True)})
    assert modality_weights(table) == {"bssfp": 1.0, "lge": 2.0, "t2": 2.0}
    with pytest.raises(UserError, match="lge"):
        modality_weights(MissingnessTable(("bssfp", "lge"), {"a": (True, False)}))


def test_tables_of_other_tasks_round_trip(tmp_path):
    table = assign(names(17), {"lge": 0.5, "t2": 0.7}, CARDIAC, 3)
    table.write(tmp_path / "t.csv")
    assert MissingnessTable.read(tmp_path / "t.csv", CARDIAC) == table
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_the_id_columns_may_be_left_out(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('data_name,mask\na,"[True, False, False, True]"\n')
    assert MissingnessTable.read(path, GLIOMA).masks == {"a": (True, False, False, True)}


HEADER = "data_name,mask_id,mask,pos_mask_ids\n"
GOOD = 'a,2,"[False, False, True, False]",[2]\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "columns are data_name"),
        (HEADER, "columns are data_name"),
        ("name,mask\na,[True]\n", "no column data_name"),
        (HEADER + GOOD + GOOD, "row 3, data_name: a has a row already"),
        (HEADER + ',2,"[False, False, True, False]",[2]\n', "row 2, data_name: empty"),
        (HEADER + 'a,2,"[False, True, False]",[2]\n', "row 2, mask: 3 entries for 4 modalities"),
        (HEADER + 'a,2,"[False, False, 1, False]",[2]\n', "row 2, mask: entries must be True or False"),
        (HEADER + 'a,2,"[False, False, False, False]",[2]\n', "row 2, mask: every modality is missing"),
        (HEADER + "a,2,\"__import__('os').getcwd()\",[2]\n", "row 2, mask: .* is not a list"),
        (HEADER + 'a,2,"' + "[" * 5000 + '",[2]\n', "row 2, mask: .* is not a list"),
        (HEADER + 'a,3,"[False, False, True, False]",[2]\n', r"row 2, mask_id: '3', but the mask \(t1\) is number 2"),
        (HEADER + 'a,2,"[False, False, True, False]","[2, 3]"\n', "row 2, pos_mask_ids"),
        (HEADER + "a,2,[False, False, True, False],[2]\n", "row 2: more fields than columns"),
        (HEADER + GOOD + 'b,2,"[False, False, True, False]",[2]\n', "row 3, data_name: b is no subject"),
        (HEADER + 'a,2,"[False\n', "not a readable CSV"),
    ],
)
def test_a_bad_table_is_explained_in_one_line(tmp_path, text, said):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as raised:
        MissingnessTable.read(path, GLIOMA, known={"a"})
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_table_that_is_not_text_or_not_there(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00\x01")
    for name in ("x.csv", "none.csv"):
        with pytest.raises(UserError, match=name):
            MissingnessTable.read(tmp_path / name, GLIOMA)


@pytest.mark.parametrize(("rates", "said"), [({"t1": 1.0}, "below 1"), ({"t1": -0.1}, "t1"), ({"pet": 0.1}, "pet")])
def test_impossible_rates_are_refused(rates, said):
    with pytest.raises(UserError, match=said):
        assign(["a"], rates, GLIOMA, 1)


def test_nobody_and_nobody_twice():
    with pytest.raises(UserError):
        assign([], {}, GLIOMA, 1)
    with pytest.raises(UserError, match="twice"):
        assign(["a", "a"], {}, GLIOMA, 1)


def test_presets():
    assert preset("mr1379", GLIOMA) == {"t1": 0.1, "t1ce": 0.3, "flair": 0.7, "t2": 0.9}
    with pytest.raises(UserError, match="four digits"):
        preset("2468", GLIOMA)
    with pytest.raises(UserError, match="--missing"):
        preset("mr2468", CARDIAC)
