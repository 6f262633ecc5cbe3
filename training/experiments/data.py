"""The data of an experiment: phantoms where it asks for them, prepared cases, and a split per imbalance and seed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from training import published
from training.errors import UserError
from training.experiments.definition import Definition, Imbalance
from training.experiments.folder import ResultsFolder
from training.parallel import cores, each
from training.prepare import find_cases, prepare_dataset

Shape = tuple[int, int, int]


def make(definition: Definition, folder: ResultsFolder, source: Path | None, say: Callable[[str], None]) -> None:
    """Phantoms and prepared cases; what is there already stays. Raises `UserError`."""
    task = definition.task()
    phantom = definition.data.phantom
    if phantom is not None:
        for part, subjects, seed in (
            ("train", phantom.subjects, phantom.seed),
            ("test", phantom.test.subjects, phantom.test.seed),
        ):
            _phantoms(folder.phantoms(part), subjects, seed, phantom.shape, phantom.spacing, say)
    raw = training_cases(folder, source)
    workers = min(cores(), 4)  # a full-size case takes about 1 GB while it is prepared
    report = prepare_dataset(raw, folder.prepared, task, workers=workers)
    if report.prepared:
        say(f"prepared {len(report.prepared)} cases, {len(report.broken)} skipped")


def check_source(definition: Definition, source: Path | None) -> None:
    """Raises `UserError` unless --data is given exactly where the definition asks for it, and has what it needs."""
    if definition.data.source is not None and source is None:
        raise UserError(f"{definition.name} runs on real scans: name their folder with --data")
    if definition.data.source is None and source is not None:
        raise UserError(f"{definition.name} makes its own phantoms: leave --data out")
    if source is not None and not source.is_dir():
        raise UserError(f"--data {source}: no such folder")
    if source is not None and definition.data.source is not None and definition.data.source.published:
        absent = published.lacking(case.id for case in find_cases(source, definition.task()))
        if absent:  # told now and not by `passion split`, after hours of preparing
            raise UserError(
                f"--data {source}: lacks {len(absent)} of the {len(published.subjects())} subjects of the published "
                f"lists, such as {absent[0]}; {definition.name} needs them all"
            )


def training_cases(folder: ResultsFolder, source: Path | None) -> Path:
    """The raw cases that are prepared for training."""
    return folder.phantoms("train") if source is None else source


def split_command(definition: Definition, folder: ResultsFolder, imbalance: Imbalance, seed: int) -> list[str]:
    """Arguments of `passion split`, but for --out."""
    arguments = ["split", str(folder.prepared), "--seed", str(seed)]
    source = definition.data.source
    if imbalance.missing is not None:
        arguments += ["--missing", ",".join(f"{name}={rate:g}" for name, rate in imbalance.missing.items())]
    elif source is not None and source.published:
        return [*arguments, "--published", imbalance.name]
    else:
        arguments += ["--preset", imbalance.name]
    val, test = (None, None) if source is None else (source.val, source.test)
    return [*arguments, "--val", f"{val or 0:g}", "--test", f"{test or 0:g}"]


def draw_split(
    definition: Definition,
    folder: ResultsFolder,
    imbalance: Imbalance,
    seed: int,
    run: Callable[[list[str], Path], None],
) -> None:
    """Make a split by `run`, which runs `passion` with arguments; one that is there already stays."""
    target = folder.split(imbalance, seed)
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    try:
        run([*split_command(definition, folder, imbalance, seed), "--out", str(making / "split")], making / "split.txt")
        (making / "split").rename(target)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def test_cases(definition: Definition, folder: ResultsFolder, source: Path | None, split: Path) -> list[str]:
    """Arguments of `passion evaluate` that name the cases to judge on."""
    if definition.data.phantom is not None:
        return [str(folder.phantoms("test"))]
    return [str(source), "--only", str(split / "test.txt")]


def steps_of_epoch(definition: Definition, folder: ResultsFolder, imbalance: Imbalance, seed: int) -> int | None:
    """Training steps of an epoch; None while the subjects are not counted."""
    batch = int(definition.train.get("batch_size", 1))
    listed = folder.split(imbalance, seed) / "train.txt"
    if listed.is_file():
        subjects = len(listed.read_text().split())
    elif definition.data.phantom is not None:
        subjects = definition.data.phantom.subjects
    else:
        return None
    return -(-subjects // batch)


def _phantoms(
    out: Path, subjects: int, seed: int, shape: Shape | None, spacing: float, say: Callable[[str], None]
) -> None:
    from training.commands.phantom import parse_shape
    from training.phantom import subject_id
    from training.phantom.anatomy import load_anatomy

    text = None if shape is None else ",".join(map(str, shape))
    grid = parse_shape(text, spacing)
    todo = [index for index in range(1, subjects + 1) if not (out / subject_id(index)).exists()]
    if not todo:
        return
    say(f"making {len(todo)} phantoms in {out}")
    load_anatomy(spacing)  # says now, once, if the template is missing
    for _ in each(partial(_make_phantom, out, seed, grid, spacing), todo, cores()):
        pass


def _make_phantom(out: Path, seed: int, shape: Shape, spacing: float, index: int) -> None:
    from training.phantom import make_subject, write_subject

    write_subject(out, make_subject(seed, index, shape, spacing))
