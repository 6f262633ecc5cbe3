"""The method page's tables say what the code says: every hyper-parameter, with its value and where it stands."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import get_args

import pytest

import models.backbones
import training.methods
import training.passion
from models.backbones import BACKBONES
from models.task import Task
from training.config import Regime, TrainConfig
from training.methods import METHODS
from training.metrics import CONVENTIONS

PAGE = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
HEADER = "| symbol | what | value | where | source |"
NO_HYPERPARAMETER = {"data", "split", "out", "name", "description", "device", "workers"}
"""Fields of `TrainConfig` that say what is read, written or computed on, not how the network is trained."""


def tables(header):
    """The rows below every table with this header, as lists of cells."""
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for table in re.findall(re.escape(header) + r"\n\|[-|: ]+\|\n((?:\|.*\n)+)", PAGE)
        for line in table.splitlines()
    ]


ROWS = {row[3].strip("`"): row for row in tables(HEADER)}
REPEATED = [row for row in tables(HEADER) if row[3] == "`training.augment.augment`"]


def stated(cell):
    """A value as Python reads it; a word is itself."""
    text = cell.strip("`")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def in_code(where):
    """The value at a place that the table names, or the source of a function or class, where it must stand."""
    argument = re.fullmatch(r"(.+)\((\w+)\)", where)
    if argument:
        return inspect.signature(in_module(argument[1])).parameters[argument[2]].default
    first, _, rest = where.partition(".")
    if first == "TrainConfig":
        return TrainConfig.model_fields[rest].default
    if first == "glioma":
        found = Task.load("glioma")
        for name in rest.split("."):
            region = next((r for r in found.regions if r.name == name), None) if isinstance(found, Task) else None
            found = region or getattr(found, name)
        return found
    return in_module(where)


def in_module(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def constants(package):
    """Every number that a module of the package names in capitals, by full name."""
    modules = [package.__name__, *(m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + "."))]
    for name in modules:
        module = importlib.import_module(name)
        for node in ast.parse(inspect.getsource(module)).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in [t for group in targets for t in (group.elts if isinstance(group, ast.Tuple) else [group])]:
                if isinstance(target, ast.Name) and target.id.isupper():
                    value = getattr(module, target.id)
                    if isinstance(value, int | float):
                        yield f"{name}.{target.id}", value


@pytest.mark.parametrize("row", [*ROWS.values(), *REPEATED], ids=lambda row: f"{row[3]} {row[2]}")
def test_a_row_has_the_value_of_the_code(row):
    value = in_code(row[3].strip("`"))
    if inspect.isroutine(value) or inspect.isclass(value):
        assert row[2].strip("`") in inspect.getsource(value)
    else:
        assert stated(row[2]) == value
        assert type(stated(row[2])) is type(value)


def test_every_hyperparameter_has_a_row():
    fields = {f"TrainConfig.{name}" for name in set(TrainConfig.model_fields) - NO_HYPERPARAMETER}
    named = {
        name for package in (training.passion, training.methods, models.backbones) for name, _ in constants(package)
    }
    assert len(named) > 20
    assert fields | named <= set(ROWS)


def test_every_source_is_explained():
    released = {row[4] for row in tables(HEADER)} - {"ours"}
    assert {"R", "R✓"} <= released
    for source in released:
        assert source in {"R", "R✓"} or source.removeprefix("ours; ").split()[0] in PAGE.split("## Hyper-parameters")[0]


def first_cells(header):
    return {row[0].split(",")[0].strip("`") for row in tables(header)}


def test_backbones_regimes_conventions_and_methods_are_all_there():
    assert first_cells("| name | published as | of note |") == set(BACKBONES)
    header = "| regime | a subject has | the fused path is given | the separate path is given | $`w_k`$ |"
    assert first_cells(header) == set(get_args(Regime))
    assert first_cells("| `--empty` | both empty | prediction empty | truth empty |") == set(CONVENTIONS)
    ablation = first_cells("| `method` | kl | proto | $`g_k`$ | $`\\beta_k`$ |")
    others = set(re.findall(r"^\*\*`([\w-]+)`\*\*:", PAGE, re.MULTILINE))
    assert ablation | others == set(METHODS)
    assert not ablation & others


def test_the_ablation_table_is_the_switches():
    for name, *marks in tables("| `method` | kl | proto | $`g_k`$ | $`\\beta_k`$ |"):
        switches = METHODS[name.strip("`")].make(("a", "b"), 2).switches
        on = (switches.pixel, switches.semantic, switches.task_wise, switches.gradient_wise)
        assert tuple(mark == "●" for mark in marks) == on, name
