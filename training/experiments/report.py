"""`write`: report.md with its tables and pictures, from what `collect` gathered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from training import atomic
from training.experiments import plots, tables
from training.experiments.collect import Results
from training.experiments.definition import BASELINE, Definition
from training.experiments.folder import CURVES, RUNS, SCORES, ResultsFolder
from training.experiments.grid import cells
from training.experiments.outcome import Outcome, missing
from training.experiments.statistics import FEWEST, mean

NOTES = "notes.md"
"""What people have to say about the results; the report takes it in."""


def write(definition: Definition, folder: ResultsFolder, results: Results) -> Path:
    """Write report.md, tables/ and plots/; returns the report's path. The same results give the same bytes."""
    parts = [f"# {definition.name}", definition.description.strip(), *_what(definition, folder, results)]
    parts += _state(definition, results)
    parts += _cost(definition, results)
    parts += ["## Missing rates", _rates(definition, results)]
    outcomes: list[Outcome] = []
    for backbone in definition.backbones:
        for imbalance in definition.imbalances:
            both = [Outcome(definition, results, backbone, imbalance.name, metric) for metric in ("dice", "hd95")]
            if both[0].arms:
                parts += _comparison(definition, folder, results, *both)
                outcomes += both
    parts += ["## How to read this", _explanation(definition, outcomes)]
    atomic.write_text(folder.path / "tables" / "all.csv", tables.csv_text(outcomes))
    path = folder.path / "report.md"
    atomic.write_text(path, "\n\n".join(p.strip("\n") for p in parts if p) + "\n")
    return path


def _what(definition: Definition, folder: ResultsFolder, results: Results) -> list[str]:
    commands = dict.fromkeys(run["command"] for run in results.runs)
    codes = {(run["code"]["commit"], run["code"]["dirty"]): 0 for run in results.runs}
    for run in results.runs:
        codes[run["code"]["commit"], run["code"]["dirty"]] += 1
    lines = [
        "commit: "
        + (f"`{commit}`" if commit else "unknown (not run from a git checkout)")
        + (", with changes that are not committed" if dirty else "")
        + (f" ({count} of {len(results.runs)} cells)" if len(codes) > 1 else "")
        for (commit, dirty), count in codes.items()
    ]
    dates = sorted(run["finished"][:10] for run in results.runs)
    if dates:
        lines.append(f"date: {dates[0]}" + (f" to {dates[-1]}" if dates[-1] != dates[0] else ""))
    lines += [f"machine: {text}" for text in dict.fromkeys(_machine(run) for run in results.runs)]
    sizes = (len(axis) for axis in (definition.backbones, definition.imbalances, definition.arms, definition.seeds))
    grid = "{} backbones x {} imbalances x {} arms x {} seeds".format(*sizes)
    if any(arm.complete for arm in definition.arms) and len(definition.imbalances) > 1:
        grid += "; what trains on complete subjects is trained once for all imbalances"
    grid += "".join(f"; {arm.name} with seeds {_list(arm.seeds)} alone" for arm in definition.arms if arm.seeds)
    notes = folder.path / NOTES
    settings = definition.model_dump(mode="json", exclude_none=True, exclude={"name", "description"})
    return [
        notes.read_text() if notes.is_file() else "",
        "## What was run",
        "```\n" + "\n".join(commands or ["(nothing yet)"]) + "\n```",
        "\n".join(f"- {line}" for line in [*lines, f"grid: {grid}"]),
        "The definition, in full (definition.yaml):",
        "```yaml\n" + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True) + "```",
    ]


def _machine(run: dict[str, Any]) -> str:
    machine, software = run["machine"], run["software"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']:g} GB, {gpus}; {machine['system']}; "
        f"Python {software['python']}, torch {software['torch']}; runs on {run['device']}"
    )


def _state(definition: Definition, results: Results) -> list[str]:
    grid = cells(definition)
    absent = missing(grid, results)
    if not absent:
        return [f"All {len(grid)} cells are finished."]
    listed = "\n".join(f"- {cell}" for cell in absent)
    return [f"**{len(absent)} of {len(grid)} cells are missing**; everything below is of the others:", listed]


def _cost(definition: Definition, results: Results) -> list[str]:
    rows = []
    for backbone in definition.backbones:
        for arm in definition.arms:
            runs = [r for r in results.runs if r["arm"] == arm.name and r["backbone"] == backbone]
            if runs:
                minutes = [mean([r[f"{what}_seconds"] for r in runs]) / 60 for what in ("training", "evaluation")]
                epochs, subjects = (sorted({r[key] for r in runs}) for key in ("epochs", "subjects"))
                rows.append(
                    [
                        backbone,
                        arm.name,
                        f"`{arm.method}`, `{arm.regime}`",
                        str(len(runs)),
                        *map(_list, (epochs, subjects)),
                    ]
                    + [f"{m:.1f}" for m in minutes]
                )
    header = ["backbone", "arm", "method, regime", "cells", "epochs", "subjects", "training, min", "evaluation, min"]
    return ["## Time per arm", "Mean over cells.", tables.markdown(header, rows, left=3)]


def _rates(definition: Definition, results: Results) -> str:
    names = definition.task().names
    rows = [
        [s["imbalance"], str(s["seed"]), str(s["subjects"]), *(f"{s['rates'][n]:.3f}" for n in names)]
        for s in results.splits
    ]
    return tables.markdown(["imbalance", "seed", "training subjects", *names], rows)


def _comparison(
    definition: Definition, folder: ResultsFolder, results: Results, dice: Outcome, hd95: Outcome
) -> list[str]:
    """One backbone under one imbalance: its tables and pictures, written and named in the report."""
    suffix = f"{dice.backbone}-{dice.imbalance}"
    parts = [
        f"## {dice.backbone}, {dice.imbalance}",
        f"{len(dice.cases)} unseen subjects, {len(dice.subsets)} subsets.",
    ]
    for outcome in (dice, hd95):
        parts += [f"### {tables.TITLES[outcome.metric]}: average over the subsets", tables.overall(outcome)]
        if outcome.metric == "hd95":
            shares = ", ".join(f"{arm} {100 * outcome.defined(arm):.1f} %" for arm in outcome.arms)
            parts.append(f"Values that are defined: {shares}.")
    single = tables.per_modality(dice)
    atomic.write_text(folder.path / "tables" / f"single-{suffix}.md", single)
    parts += ["### Dice from a single modality, the most often missing first", single]
    for outcome in (dice, hd95):
        title = tables.TITLES[outcome.metric]
        table = tables.per_subset(outcome)
        texts = [f"### {title} per subset", table]
        for arm in outcome.others:
            texts += [f"{title}, {arm} - {BASELINE}:", tables.differences_per_subset(outcome, arm)]
        parts += texts
        atomic.write_text(folder.path / "tables" / f"{outcome.metric}-{suffix}.md", "\n\n".join(texts))
        atomic.write_text(folder.path / "tables" / f"{outcome.metric}-{suffix}.csv", tables.csv_text([outcome]))
    drawn = folder.path / "plots"
    plots.dice_per_subset(dice, drawn / f"dice-{suffix}.png")
    parts.append(f"![Dice per subset](plots/dice-{suffix}.png)")
    if plots.preference(definition, results, dice.backbone, dice.imbalance, drawn / f"preference-{suffix}.png"):
        parts.append(f"![Distance to the teacher and beta over epochs](plots/preference-{suffix}.png)")
    if plots.convergence(definition, results, dice.backbone, dice.imbalance, drawn / f"convergence-{suffix}.png"):
        parts.append(f"![Loss of each modality alone over epochs](plots/convergence-{suffix}.png)")
    return parts


def _explanation(definition: Definition, outcomes: Sequence[Outcome]) -> str:
    regions = ", ".join(r.name for r in definition.task().regions)
    extra = sorted({name for o in outcomes for name in o.extra})
    post = f" {', '.join(extra)}: post-processed, not part of the average." if extra else ""
    return f"""\
- A subject's value is its mean over seeds; a table shows the mean over subjects. *average* is over {regions}.{post}
- Empty regions count as `{definition.evaluate.empty}` (`passion evaluate --empty`). Values that this leaves undefined
  are left out, of means and of pairs. With `published` an HD95 is undefined where one of prediction and truth is empty,
  so a model that misses small regions can look good by it: read it beside Dice.
- `arm - {BASELINE}`: mean of the paired differences over subjects, over the seeds that both arms have, with its 95 %
  interval (Student's t) and p of Wilcoxon's signed-rank test, two-sided, after Holm's correction over all tests of the
  table; bold where p < 0.05. With fewer than {FEWEST} subjects (or {FEWEST} that differ) there is no test. For Dice
  above 0 is better, for HD95 below.
- *slope*: per subject, the least-squares slope of the single-modality Dice differences over the missing rates (mean
  over seeds); above 0 if what is missing more often gains more. Its p is not corrected.
- The tests are over subjects: they speak of these trained models. What another seed would change is in *SD over seeds*
  and in the seeds in which an arm is the better one.
- A seed sets who misses what, the initial weights and the order of crops; subjects are the same for all seeds and arms.
- `tables/`: these tables, and `all.csv` with every figure. `{SCORES}`, `{CURVES}`, `{RUNS}`: what they are made
  from, a line per case, subset and region; per epoch and modality; per cell."""


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
