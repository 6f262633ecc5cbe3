"""Tasks: names and aliases, labels, subsets, and what a contradictory one says."""

from pathlib import Path

import numpy as np
import pytest

from models.backbones import BACKBONES
from models.task import TASKS, Task, TaskError

GLIOMA = Task.load("glioma")
MYOPS = Task.load("myops2020")


def test_glioma_is_as_published():
    assert GLIOMA.names == ("flair", "t1ce", "t1", "t2")
    assert [r.name for r in GLIOMA.regions] == ["WT", "TC", "ET"]
    assert GLIOMA.patch_size == (80, 80, 80)
    assert len(GLIOMA.subsets()) == 15


@pytest.mark.parametrize("path", sorted(TASKS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_task_loads_and_survives_json(path):
    task = Task.load(path.stem)
    assert task.name == path.stem
    assert Task.model_validate_json(task.model_dump_json()) == task


def test_the_documented_task_loads_and_the_shipped_ones_are_documented(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    (tmp_path / "knee.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    assert Task.load(tmp_path / "knee.yaml").names == ("dess", "t2map")
    for path in TASKS.glob("*.yaml"):
        assert f"| `{path.stem}` |" in page


@pytest.mark.parametrize("name", ["glioma", "myops2020", "prostate"])
def test_every_backbone_takes_the_patch_of_a_shipped_task(name):
    task = Task.load(name)
    for backbone, entry in BACKBONES.items():
        assert all(p % entry.divisor == 0 and p >= 2 * entry.divisor for p in task.patch_size), backbone
    assert np.prod(task.patch_size) <= 1.1 * 80**3  # a step costs no more than the published one


def test_hearts_are_as_published():
    assert [MYOPS.canonical(n) for n in ("C0", "DE", "LGE", "T2")] == ["bssfp", "lge", "lge", "t2"]
    assert [label.value for label in MYOPS.labels] == [0, 200, 500, 600, 1220, 2221]
    scored = {r.name: [MYOPS.labels[i].value for i in r.labels] for r in MYOPS.regions}
    assert scored["scar"] == [2221]
    assert scored["pathology"] == [1220, 2221]
    assert scored["myocardium"] == [200, 1220, 2221]


@pytest.mark.parametrize("kind", [np.int16, np.uint16, np.float32, np.float64])
def test_values_above_255_are_read_and_written(kind):
    values = np.array([[0, 200, 500], [600, 1220, 2221]], kind)
    classes = MYOPS.read_labels(values)
    assert (classes.dtype, classes.tolist()) == (np.uint8, [[0, 1, 2], [3, 4, 5]])
    written = MYOPS.write_labels(classes)
    assert (written.dtype, written.tolist()) == (np.uint16, values.tolist())
    assert GLIOMA.write_labels(classes[:, :1]).dtype == np.uint8


@pytest.mark.parametrize(
    ("alias", "name"), [("t1c", "t1ce"), ("T1GD", "t1ce"), ("t2f", "flair"), ("t1n", "t1"), ("t2w", "t2"), ("T2", "t2")]
)
def test_aliases_are_read_in_any_case(alias, name):
    assert GLIOMA.canonical(alias) == name


def test_a_foreign_modality_is_named():
    with pytest.raises(TaskError, match="'dwi' is no modality of task glioma: it has flair, t1ce, t1, t2"):
        GLIOMA.canonical("dwi")


def test_both_values_of_enhancing_tumour_are_read_and_one_is_written():
    values = np.array([[0, 1, 2], [3, 4, 0]])
    classes = GLIOMA.read_labels(values)
    assert classes.tolist() == [[0, 1, 2], [3, 3, 0]]
    assert GLIOMA.write_labels(classes).tolist() == [[0, 1, 2], [4, 4, 0]]
    newer = GLIOMA.with_label_values({3: 3})
    assert newer.write_labels(classes).tolist() == [[0, 1, 2], [3, 3, 0]]
    assert newer.read_labels(values).tolist() == classes.tolist()


def test_foreign_labels_are_named():
    with pytest.raises(TaskError, match=r"label values \[7\]"):
        GLIOMA.read_labels(np.array([0, 7]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": [4, 80, 80]}, "too small"),
        ({"orientation": "LLS"}, "neither three axis codes such as LPS nor 'stored'"),
        ({"spacing": [1, 0, 1]}, "spacing"),
        ({"regions": [{"name": "WT", "labels": [4]}]}, "class indices from 1 to 3"),
        ({"labels": [{"name": "a", "value": 1}, {"name": "b", "value": 2}]}, "background"),
        ({"modalities": [{"name": "t1", "aliases": ["t2"]}, {"name": "t2"}]}, "stands twice"),
        ({"modality": []}, "Extra inputs"),
        ({"labels": [{"name": "a", "value": 0}, {"name": "b", "value": 65536}]}, "labels.1.value: .* 65535"),
        ({"modalities": [{"name": "t1"}, {"name": "seg"}]}, "seg means the labels"),
        ({"label_suffixes": ["gd", "t2w"]}, "t2w means the labels"),
        ({"label_suffixes": []}, "label_suffixes"),
    ],
)
def test_a_contradictory_task_says_what_is_wrong(change, message, tmp_path):
    import yaml

    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump(GLIOMA.model_dump(mode="json") | change))
    with pytest.raises(TaskError, match=message) as caught:
        Task.load(path)
    assert "\n" not in str(caught.value)


def test_an_unknown_task_lists_the_shipped_ones():
    with pytest.raises(TaskError, match=r"shipped tasks .*glioma"):
        Task.load("liver")
