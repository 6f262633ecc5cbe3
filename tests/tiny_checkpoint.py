"""A checkpoint with random weights: small enough to serve within a test, and still a whole one."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.task import Task

PATCH = 16


def make(folder: Path, seed: int = 0, task: "Task | None" = None) -> Path:
    """A model of the smallest width, with scores for two subsets on its card; glioma with the smallest patch."""
    import torch

    from models.backbones import build
    from models.card import Card, Scores, SubsetScore
    from models.checkpoint import save_checkpoint
    from models.task import Task

    if task is None:
        task = Task.load("glioma")
        task = Task.model_validate(task.model_dump() | {"patch_size": (PATCH,) * 3, "min_crop": PATCH})
    torch.manual_seed(seed)
    network = build("rfnet", task, 8)
    dice = {"WT": 0.5, "TC": 0.25, "ET": None}
    scores = Scores(
        dataset="nothing but noise",
        cases=3,
        empty_region="published",
        subsets=[
            SubsetScore(modalities=["flair"], dice=dice, hd95=dict.fromkeys(dice)),
            SubsetScore(modalities=list(task.names), dice=dice | {"WT": 0.75, "ET": 0.1}, hd95=dict.fromkeys(dice)),
        ],
    )
    card = Card(
        name=folder.name,
        description="Random weights, for tests.",
        task=task,
        backbone="rfnet",
        width=8,
        regime="idt",
        method="none",
        missing_rates=dict.fromkeys(task.names, 0.5),
        scores=scores,
    )
    save_checkpoint(folder, card, network)
    return folder
