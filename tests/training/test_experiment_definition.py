"""Definitions of experiments: what is refused and how it is named, the grid, and whose results a folder holds."""

import pytest
import yaml

from training.errors import UserError
from training.experiments import files
from training.experiments.folder import ResultsFolder, differences
from training.experiments.grid import Cell, cells, identity

SMALL = {
    "name": "small",
    "data": {"task": "glioma-4mm", "phantom": {"subjects": 4, "seed": 1, "test": {"subjects": 2, "seed": 2}}},
    "imbalances": ["mr2468", {"name": "t2-rare", "missing": {"t2": 0.75}}],
    "backbones": ["rfnet"],
    "arms": [
        {"name": "baseline"},
        {"name": "PASSION", "method": "passion"},
        {"name": "complete", "regime": "pdt"},
    ],
    "seeds": [1, 2],
    "train": {"epochs": 2},
    "scales": {"usual": {}, "long": {"train": {"epochs": 9}, "data": {"phantom": {"subjects": 8}}, "seeds": [1]}},
}


def write(folder, **changes):
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | changes, sort_keys=False))
    return path


def arms(**changes):
    return [{"name": "baseline"}, {"name": "other"} | changes]


def source(**values):
    return {"task": "glioma", "source": values}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 3}, "unknown key 'epoch'"),
        ({"name": "../elsewhere"}, "name: String should match"),
        (
            {"data": {"phantom": {"subjects": 1, "seed": 1, "test": {"subjects": 1, "seed": 1}}}},
            "test.seed must differ",
        ),
        ({"data": {"task": "glioma"}}, "data: give one of phantom and source"),
        ({"data": SMALL["data"] | {"task": "liver"}}, "data.task: no task 'liver'"),
        ({"data": {"phantom": {"subjects": 0, "seed": 1}}}, "data.phantom.subjects: Input should be greater"),
        ({"data": source(published=False), "imbalances": ["mr2468"]}, "data.source: give either published"),
        ({"data": source(published=True)}, "imbalances.t2-rare: missing rates are drawn"),
        (
            {"data": source(published=True), "imbalances": ["mr1111"]},
            "imbalances.mr1111: not published; there are mr1379",
        ),
        ({"imbalances": ["mr24"]}, "imbalances.mr24: preset 'mr24'"),
        ({"imbalances": [{"name": "a", "missing": {"ct": 0.5}}]}, "imbalances.a: 'ct' is no modality"),
        ({"imbalances": []}, "imbalances: Tuple should have at least 1 item"),
        ({"backbones": ["resnet"]}, "backbones: 'resnet' is unknown; there are rfnet"),
        ({"seeds": [3, 3]}, "seeds: 3 stands twice"),
        ({"arms": [{"name": "PASSION"}]}, "arms: one must be named 'baseline'"),
        ({"arms": arms(name="Baseline")}, "arms: baseline stands twice"),
        ({"arms": arms(method="magic")}, "arms.other.method: 'magic' is unknown; choose one of none, passion"),
        ({"arms": arms(regime="half")}, "arms.other.regime: Input should be 'idt'"),
        ({"arms": arms(seeds=[99])}, "arms.other.seeds: 99 is none of the experiment's seeds"),
        ({"arms": arms(seeds=[])}, "seeds: Tuple should have at least 1 item"),
        ({"train": {"epoch": 3}}, "train: unknown key 'epoch'; known keys: data"),
        ({"train": {"epochs": 0}}, "train.epochs: Input should be greater"),
        ({"train": {"seed": 1}}, "train.seed: belongs to the grid; give it under seeds"),
        ({"train": {"out": "x"}}, "train.out: set by the experiment"),
        ({"train": {"crop": [20, 32, 32]}}, "train.crop: rfnet needs multiples of 8, at least 16"),
        (
            {"backbones": ["rfnet", "mmformer"], "train": {"crop": [24, 32, 32]}},
            "train.crop: mmformer needs multiples of 16",
        ),
        ({"train": {"epochs": 2, "warmup_epochs": 2}}, "train.warmup_epochs: 2 leaves no epoch of 2"),
        ({"evaluate": {"empty": "zero"}}, "evaluate: empty: 'zero' is unknown: use one of published"),
        ({"evaluate": {"subsets": ["flair+ct"]}}, "evaluate.subsets: 'ct' is no modality"),
        ({"scales": {"big": {"name": "x"}}}, "scales.big: a scale cannot change 'name'"),
        ({"scales": [1]}, "scales: expected names"),
    ],
)
def test_a_bad_definition_is_one_line_with_file_and_field(tmp_path, changes, message):
    path = write(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        files.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_definition_is_refused(tmp_path):
    with pytest.raises(UserError, match="give a YAML file or one of brats2020-ablation"):
        files.find("nonsense")
    with pytest.raises(UserError, match="cannot read the definition"):
        files.read(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="no scale 'huge'; it has usual, long"):
        files.read(write(tmp_path), "huge")


def test_a_scale_changes_what_it_names_and_nothing_else(tmp_path):
    path = write(tmp_path)
    usual, long = files.read(path), files.read(path, "long")
    assert (usual.scale, long.scale) == ("usual", "long")
    assert (usual.train, long.train) == ({"epochs": 2}, {"epochs": 9})
    assert long.data.phantom.subjects == 8
    assert long.data.phantom.test == usual.data.phantom.test
    assert (usual.seeds, long.seeds) == ((1, 2), (1,))


@pytest.mark.parametrize("name", sorted(files.shipped()))
def test_every_shipped_definition_is_sound_at_every_scale(name):
    path = files.shipped()[name]
    for scale in [None, *files.scales(path)]:
        assert files.read(path, scale).name == name


def test_the_paper_s_grid_trains_complete_subjects_once_per_backbone():
    grid = cells(files.read(files.shipped()["brats2020-main"]))
    assert len(grid) == 3 * (8 * 2 + 1)
    assert sum(cell.imbalance is None for cell in grid) == 3
    assert len({cell.id for cell in grid}) == len(grid)


def test_a_cell_s_identity_is_its_own_affair(tmp_path):
    cell = Cell("rfnet", "mr2468", "PASSION", 1)
    was = identity(files.read(write(tmp_path)), cell)
    more = [*SMALL["arms"], {"name": "DWA", "method": "dwa"}]
    assert identity(files.read(write(tmp_path, arms=more, seeds=[1, 2, 3], description="new")), cell) == was
    assert identity(files.read(write(tmp_path, train={"epochs": 3})), cell) != was
    assert identity(files.read(write(tmp_path)), Cell("rfnet", "mr2468", "PASSION", 2)) != was


def test_an_arm_may_have_fewer_seeds_and_get_more_later(tmp_path):
    few, all_of_them = ([*SMALL["arms"][:2], SMALL["arms"][2] | more] for more in ({"seeds": [2]}, {}))
    fewer, full = files.read(write(tmp_path, arms=few)), files.read(write(tmp_path, arms=all_of_them))
    assert [cell.seed for cell in cells(fewer) if cell.arm == "complete"] == [2]
    assert [cell.seed for cell in cells(fewer) if cell.arm == "PASSION" and cell.imbalance == "t2-rare"] == [1, 2]
    assert differences(fewer, full) == differences(full, fewer) == []
    assert {identity(fewer, cell) for cell in cells(fewer)} < {identity(full, cell) for cell in cells(full)}


def test_a_results_folder_may_grow_but_not_change(tmp_path):
    folder = ResultsFolder(tmp_path / "results")
    first = files.read(write(tmp_path))
    folder.open_for(first, fresh=False)
    assert differences(files.read(folder.definition), first) == []
    grown = files.read(write(tmp_path, seeds=[1, 2, 3], arms=[*SMALL["arms"], {"name": "DWA", "method": "dwa"}]))
    folder.open_for(grown, fresh=False)

    other = files.read(write(tmp_path, train={"epochs": 5}))
    with pytest.raises(UserError, match=r"another definition: train.epochs: 2 -> 5; .*--fresh"):
        folder.open_for(other, fresh=False)
    renamed = files.read(write(tmp_path, arms=[{"name": "baseline", "method": "pmr"}]))
    with pytest.raises(UserError, match=r"arms\.baseline: .*none.* -> .*pmr"):
        folder.open_for(renamed, fresh=False)
    with pytest.raises(UserError, match=r"\(made with --scale usual\): data.phantom.subjects: 4 -> 8; train.epochs"):
        folder.open_for(files.read(write(tmp_path), "long"), fresh=False)


def test_fresh_throws_away_results_and_keeps_what_people_wrote(tmp_path):
    folder = ResultsFolder(tmp_path / "results")
    folder.open_for(files.read(write(tmp_path)), fresh=False)
    (folder.work / "runs").mkdir()
    (folder.path / "report.md").write_text("old")
    (folder.path / "notes.md").write_text("thoughts")
    folder.open_for(files.read(write(tmp_path, train={"epochs": 5})), fresh=True)
    assert sorted(p.name for p in folder.path.iterdir()) == ["definition.yaml", "notes.md", "work"]
    assert not any(folder.work.iterdir())


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    folder = ResultsFolder(tmp_path)
    folder.work.mkdir()
    (folder.work / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="choose another folder"):
        folder.open_for(files.read(write(tmp_path)), fresh=True)
    assert (folder.work / "thesis.tex").exists()
