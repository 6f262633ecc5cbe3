"""Pictures of results."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from models.card import Scores
from models.task import Task
from training import atomic


def dice_per_subset(scores: Scores, task: Task, path: Path) -> None:
    """A PNG: mean Dice of every region per subset, the subsets shown as dots below."""
    regions = [r.name for r in task.regions]
    columns = len(scores.subsets)
    figure = Figure(figsize=(max(6.0, 0.55 * columns + 2), 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=[4, 1], sharex=True)
    width = 0.8 / len(regions)
    for i, region in enumerate(regions):
        values = [s.dice[region] for s in scores.subsets]
        places = [x + (i - (len(regions) - 1) / 2) * width for x in range(columns)]
        above.bar(places, [0.0 if v is None else v for v in values], width, label=region)
    above.set_ylim(0, 1)
    above.set_ylabel("mean Dice")
    above.grid(axis="y", alpha=0.3)
    above.legend(loc="upper left", ncols=len(regions), frameon=False)
    above.set_title(f"{scores.dataset}, {scores.cases} cases", fontsize=10)
    for y, name in enumerate(task.names):
        for x, subset in enumerate(scores.subsets):
            below.plot(x, y, "o", color="black" if name in subset.modalities else "lightgrey", markersize=8)
    below.set_yticks(range(len(task.names)), task.names)
    below.set_xticks([])
    below.set_ylim(len(task.names) - 0.5, -0.5)
    for side in ("top", "right", "bottom", "left"):
        below.spines[side].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, dpi=110, format="png")
    atomic.write_bytes(path, png.getvalue())
