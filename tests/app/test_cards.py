import json

import pytest
import tiny_checkpoint

from app.jobs.cards import CardError, ModelShelf


@pytest.fixture(scope="module")
def shelf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_checkpoint.make(folder / "tiny")
    return folder


def test_reads_what_models_writes(shelf_folder):
    card = ModelShelf(shelf_folder).get("tiny")
    assert card.modalities == ("flair", "t1ce", "t1", "t2")
    assert [label.value for label in card.task.labels] == [0, 1, 2, 4]
    assert [region.name for region in card.task.regions] == ["WT", "TC", "ET"]
    assert len(card.weights_sha256) == 64


@pytest.mark.parametrize(
    ("given", "canonical"),
    [("flair", "flair"), ("t2f", "flair"), ("T1C", "t1ce"), ("t1gd", "t1ce"), ("T2W", "t2"), ("dwi", None)],
)
def test_names_and_aliases(shelf_folder, given, canonical):
    assert ModelShelf(shelf_folder).get("tiny").canonical(given) == canonical


def test_the_expectation_is_for_the_very_subset_in_any_order(shelf_folder):
    card = ModelShelf(shelf_folder).get("tiny")
    assert card.expectation(("flair",)).dice == {"WT": 0.5, "TC": 0.25, "ET": None}
    assert card.expectation(("t2", "t1", "t1ce", "flair")).dice["WT"] == 0.75
    assert card.expectation(("t2",)) is None


def test_a_model_is_a_folder_with_a_card(shelf_folder, tmp_path):
    assert ModelShelf(shelf_folder).names() == ["tiny"]
    assert ModelShelf(tmp_path / "nowhere").names() == []
    shelf = ModelShelf(shelf_folder)
    assert shelf.get("../tiny") is None
    assert shelf.get("") is None


def test_the_default_is_the_only_one_or_the_chosen(tmp_path):
    def add(name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "card.json").write_text("{}")

    assert ModelShelf(tmp_path).default() is None
    add("a")
    assert ModelShelf(tmp_path).default() == "a"
    add("b")
    assert ModelShelf(tmp_path).default() is None
    assert ModelShelf(tmp_path, "b").default() == "b"
    assert ModelShelf(tmp_path, "c").default() is None


def test_a_changed_card_is_read_again(shelf_folder, tmp_path):
    text = (shelf_folder / "tiny" / "card.json").read_text()
    card = tmp_path / "m" / "card.json"
    card.parent.mkdir()
    card.write_text(text)
    shelf = ModelShelf(tmp_path)
    assert shelf.get("m").description == "Random weights, for tests."
    card.write_text(json.dumps(json.loads(text) | {"description": "other"}))
    assert shelf.get("m").description == "other"


def test_a_broken_card_is_named_with_its_field(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "card.json").write_text('{"name": "m", "backbone": "rfnet", "task": {"name": "x"}}')
    with pytest.raises(CardError, match=r"^m/card.json: task.modalities: Field required$"):
        ModelShelf(tmp_path).get("m")
