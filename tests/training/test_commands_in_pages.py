"""The commands that the pages show exist, with the options that they show."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from app.cli import cli as server
from training.cli import app as passion
from training.experiments.files import find, read, shipped
from training.experiments.grid import cells

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {"passion": typer.main.get_command(passion), "passion-server": typer.main.get_command(server)}


def commands(page):
    """Every line of an indented or fenced block that calls one of our programs, as its words."""
    for line in page.read_text().splitlines():
        match = re.match(r"(?: {4}|\$ )?(?:\S*/)?((?:passion|passion-server) .*)", line)
        if match:
            yield shlex.split(match[1].replace("[", "").replace("]", ""), comments=True)


SHOWN = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), [pytest.param(p, w, id=f"{p.name}: {' '.join(w)}"[:90]) for p, w in SHOWN])
def test_a_command_and_its_options_exist(page, words):
    program, *rest = words
    command = PROGRAMS[program]
    while hasattr(command, "commands"):  # `keys create`, say
        name, *rest = rest
        assert name in command.commands, f"{page.name}: no command {name}"
        command = command.commands[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    given = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
    assert given <= known


def test_the_experiments_have_the_cells_that_the_page_counts():
    text = (ROOT / "docs" / "reproduce.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)(?: --scale ([\w-]+))?` \| (\d+) \|", text, re.MULTILINE)
    assert {name for name, _, _ in rows} == {name for name in shipped() if name.startswith("brats2020")}
    for name, scale, count in rows:
        assert len(cells(read(find(name), scale or None))) == int(count), (name, scale)


def test_the_pages_show_commands():
    assert {"prepare", "split", "train", "evaluate", "experiment", "import"} <= {
        words[1] for page, words in SHOWN if page.name == "reproduce.md"
    }
