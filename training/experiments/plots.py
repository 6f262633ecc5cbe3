"""The pictures of a report."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training import atomic
from training.experiments.collect import Curve, Results
from training.experiments.definition import Definition
from training.experiments.outcome import Outcome
from training.experiments.statistics import mean

# Okabe and Ito's colours, told apart with any kind of colour vision; dashes and markers say the same again.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)))


def dice_per_subset(outcome: Outcome, path: Path) -> None:
    """A PNG: a panel per region, a mark per arm and subset, the subsets shown as dots below."""
    regions = outcome.regions
    columns = len(outcome.subsets)
    figure, panels = _figure(
        (max(6.0, 0.55 * columns + 2), 2.1 * len(regions) + 1.6), (len(regions) + 1, 1), [3] * len(regions) + [1.4]
    )
    for region, panel in zip(regions, panels, strict=False):
        for i, arm in enumerate(outcome.arms):
            shift = (i - (len(outcome.arms) - 1) / 2) * 0.16
            values = [outcome.value(arm, subset, region) for subset in outcome.subsets]
            panel.plot([x + shift for x in range(columns)], values, MARKERS[i % 8], color=COLOURS[i % 8], label=arm)
        panel.set_ylabel(f"{region}, Dice")
        panel.set_xlim(-0.6, columns - 0.4)
        panel.set_xticks([])
        panel.grid(axis="y", alpha=0.3)
    figure.suptitle(f"{outcome.backbone}, {outcome.imbalance}: {len(outcome.cases)} unseen subjects", fontsize=10)
    _legend(figure, panels[0])
    below = panels[-1]
    for y, name in enumerate(outcome.task.names):
        for x, subset in enumerate(outcome.subsets):
            below.plot(x, y, "o", color="black" if name in subset else "lightgrey", markersize=7)
    below.set_yticks(range(len(outcome.task.names)), outcome.task.names)
    below.set_xticks([])
    below.set_xlim(-0.6, columns - 0.4)
    below.set_ylim(len(outcome.task.names) - 0.5, -0.5)
    for side in ("top", "right", "bottom", "left"):
        below.spines[side].set_visible(False)
    _save(figure, path)


def preference(definition: Definition, results: Results, backbone: str, imbalance: str, path: Path) -> bool:
    """A PNG: distance to the teacher and weight beta of every modality over epochs, a row per arm that has them.

    The thick line is the mean over seeds, the thin ones are the seeds. False, and no file, if no arm has any.
    """
    arms = [
        arm.name
        for arm in definition.arms
        if any(c.beta is not None for c in _curves(definition, results, backbone, imbalance, arm.name))
    ]
    if not arms:
        return False
    figure, panels = _figure((9.0, 2.8 * len(arms) + 0.4), (len(arms), 2), None)
    for row, arm in enumerate(arms):
        curves = _curves(definition, results, backbone, imbalance, arm)
        for column, (what, label) in enumerate((("dist", "distance to the teacher"), ("beta", "beta"))):
            panel = panels[2 * row + column]
            _modalities(panel, definition.task().names, curves, what)
            panel.set_ylabel(label)
            panel.set_title(f"{arm}: {label}", fontsize=9)
    _legend(figure, panels[0])
    for panel in panels[-2:]:
        panel.set_xlabel("epoch")
    _save(figure, path)
    return True


def convergence(definition: Definition, results: Results, backbone: str, imbalance: str, path: Path) -> bool:
    """A PNG: the separate decoder's loss of every modality over epochs, a panel per arm. False if no run has it."""
    of_arms = {arm.name: _curves(definition, results, backbone, imbalance, arm.name) for arm in definition.arms}
    by_arm = {name: curves for name, curves in of_arms.items() if any(c.sep is not None for c in curves)}
    if not by_arm:
        return False
    figure, panels = _figure((3.4 * len(by_arm) + 0.8, 3.4), (1, len(by_arm)), None, share_y=True)
    for panel, (arm, curves) in zip(panels, by_arm.items(), strict=True):
        _modalities(panel, definition.task().names, curves, "sep")
        panel.set_title(arm, fontsize=9)
        panel.set_xlabel("epoch")
    panels[0].set_ylabel("loss of the modality alone (sep)")
    _legend(figure, panels[0])
    _save(figure, path)
    return True


def _curves(definition: Definition, results: Results, backbone: str, imbalance: str, arm: str) -> list[Curve]:
    complete = next(a for a in definition.arms if a.name == arm).complete
    return [
        c
        for c in results.curves
        if (c.cell.backbone, c.cell.arm, c.cell.imbalance) == (backbone, arm, None if complete else imbalance)
    ]


def _modalities(panel: Any, names: Sequence[str], curves: Sequence[Curve], what: str) -> None:
    for i, name in enumerate(names):
        values: dict[int, dict[int, float]] = {}
        for curve in curves:
            value = getattr(curve, what)
            if curve.modality == name and value is not None:
                values.setdefault(curve.cell.seed, {})[curve.epoch] = value
        style = {"color": COLOURS[1 + i % 7], "linestyle": DASHES[i % 8]}
        if len(values) > 1:
            for of_seed in values.values():
                panel.plot(list(of_seed), list(of_seed.values()), linewidth=0.6, alpha=0.5, **style)
        epochs = sorted({epoch for of_seed in values.values() for epoch in of_seed})
        means = [mean([of_seed[e] for of_seed in values.values() if e in of_seed]) for e in epochs]
        panel.plot(epochs, means, linewidth=1.8, marker="o" if len(epochs) == 1 else None, label=name, **style)
    panel.grid(alpha=0.3)


def _figure(
    size: tuple[float, float], grid: tuple[int, int], heights: Sequence[float] | None, *, share_y: bool = False
) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(*grid, squeeze=False, height_ratios=heights, sharey=share_y)
    return figure, list(panels.flat)


def _legend(figure: Figure, panel: Any) -> None:
    """What the marks of a panel mean, below all panels, where it hides nothing."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)


def _save(figure: Figure, path: Path) -> None:
    png = io.BytesIO()
    figure.savefig(png, dpi=110, format="png", metadata={"Software": None})
    atomic.write_bytes(path, png.getvalue())
