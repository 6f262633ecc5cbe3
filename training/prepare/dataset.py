"""A whole data set: subjects in parallel, what was skipped and why, and one `dataset.json` at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from models.task import Task
from training import atomic
from training.errors import UserError
from training.parallel import each
from training.prepare.convert import PARTIAL, BrokenCaseError, convert, fingerprint, read_record
from training.prepare.discover import find_cases
from training.prepare.raw_case import RawCase


@dataclass(frozen=True)
class CaseOutcome:
    """What became of one subject: `record` is its case.json, or `problem` says why there is none."""

    id: str
    record: dict[str, Any] | None
    problem: str | None = None
    up_to_date: bool = False


@dataclass
class Report:
    """What a run did, by subject id."""

    prepared: list[str] = field(default_factory=list)
    up_to_date: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    """In the data set before, not among its cases now; their folders stay where they are."""
    broken: dict[str, str] = field(default_factory=dict)
    incomplete: dict[str, list[str]] = field(default_factory=dict)
    """Usable subjects and the modalities that they lack."""
    label_values: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> str:
        """The content of report.json."""
        return json.dumps({"schema_version": 1, **vars(self)}, indent=1) + "\n"


def prepare_dataset(
    source: Path,
    out: Path,
    task: Task,
    workers: int = 1,
    strict: bool = False,
    on_start: Callable[[int], None] = lambda _total: None,
    on_case: Callable[[CaseOutcome], None] = lambda _outcome: None,
) -> Report:
    """Prepare every subject under `source` into `out`; broken ones are left out and reported.

    Writes out/<id>/, out/report.json and, last, out/dataset.json. A subject whose source files are unchanged is not
    made again. `strict`: a broken subject ends the run with an error, after the report. Raises `UserError` too where
    no subject is usable, or files disagree over a label's value.
    """
    if out.resolve() == source.resolve():
        raise UserError(f"{out}: the output folder is the source; choose another one")
    cases = find_cases(source, task)
    foreign = next((c.id for c in cases if (out / c.id).exists() and not (out / c.id / "case.json").is_file()), None)
    if foreign is not None:  # perhaps the scans themselves: never replaced
        raise UserError(f"{out / foreign} exists and is no prepared case: choose another output folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot make the folder ({error.strerror})") from None
    for leftover in out.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    before = _cases_before(out)
    on_start(len(cases))
    outcomes = {}
    for outcome in _run(cases, task, out, workers):
        outcomes[outcome.id] = outcome
        on_case(outcome)

    report = Report()
    records: dict[str, dict[str, Any]] = {}
    for name, outcome in sorted(outcomes.items()):
        if outcome.record is None:
            report.broken[name] = outcome.problem or "unknown"
            continue
        records[name] = outcome.record
        (report.up_to_date if outcome.up_to_date else report.prepared).append(name)
        absent = [m for m in task.names if m not in outcome.record["modalities"]]
        if absent:
            report.incomplete[name] = absent
    report.removed = [name for name in before if name not in records]
    values = _label_values(records, task) if records else {}
    report.label_values = {task.labels[i].name: v for i, v in values.items()}
    atomic.write_text(out / "report.json", report.as_json())
    if not records:
        first, why = next(iter(report.broken.items()))
        raise UserError(f"{source}: none of {len(cases)} cases can be used; {first}: {why}")
    if strict and report.broken:
        first, why = next(iter(report.broken.items()))
        raise UserError(
            f"{len(report.broken)} of {len(cases)} cases are broken (see {out / 'report.json'}); {first}: {why}"
        )
    content = {
        "schema_version": 1,
        "task": task.with_label_values(values).model_dump(mode="json"),
        "cases": sorted(records),
    }
    atomic.write_text(out / "dataset.json", json.dumps(content, indent=1) + "\n")
    return report


def _run(cases: list[RawCase], task: Task, out: Path, workers: int) -> Iterator[CaseOutcome]:
    # What is up to date or hopeless is told here: a re-run then starts no process for it.
    todo = []
    for case in cases:
        outcome = _known(case, task, out)
        if outcome is None:
            todo.append(case)
        else:
            yield outcome
    yield from each(partial(_make, task=task, out=out), todo, workers)


def _known(case: RawCase, task: Task, out: Path) -> CaseOutcome | None:
    if case.problem is not None:
        return CaseOutcome(case.id, None, case.problem)
    try:
        source = fingerprint(case, task)
    except OSError as error:
        return CaseOutcome(case.id, None, f"{Path(error.filename or '').name}: cannot be read ({error.strerror})")
    record = read_record(out / case.id)
    if record is None or record.get("source") != source:
        return None
    return CaseOutcome(case.id, record, up_to_date=True)


def _make(case: RawCase, task: Task, out: Path) -> CaseOutcome:
    try:
        return CaseOutcome(case.id, convert(case, task, out))
    except BrokenCaseError as error:
        return CaseOutcome(case.id, None, str(error))


def _cases_before(out: Path) -> list[str]:
    try:
        content = json.loads((out / "dataset.json").read_text())
        return [str(name) for name in content["cases"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _label_values(records: dict[str, dict[str, Any]], task: Task) -> dict[int, int]:
    """The value the files hold for each class that data sets disagree on; the task's own where no file has one."""
    chosen: dict[int, int] = {}
    for index, label in enumerate(task.labels):
        if not label.also_read:
            continue
        holders = {
            value: [name for name, record in records.items() if value in record["label_values"]]
            for value in (label.value, *label.also_read)
        }
        used = {value: names for value, names in holders.items() if names}
        if len(used) > 1:
            say = " and ".join(
                f"{value} in {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                for value, names in sorted(used.items())
            )
            raise UserError(f"cases disagree over the value of {label.name}: {say}; prepare them as two data sets")
        chosen[index] = next(iter(used), label.value)
    return chosen
