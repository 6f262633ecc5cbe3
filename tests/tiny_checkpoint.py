"""A checkpoint with random weights: small enough to serve within a test, and still a whole one."""

from pathlib import Path

PATCH = 16


def make(folder: Path, seed: int = 0) -> Path:
    """A glioma model of the smallest width and patch, with scores for two subsets on its card."""
    import torch

    from models.backbones import build
    from models.card import Card, Scores, SubsetScore
    from models.checkpoint import save_checkpoint
    from models.task import Task

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
        passion=False,
        missing_rates=dict.fromkeys(task.names, 0.5),
        scores=scores,
    )
    save_checkpoint(folder, card, network)
    return folder
