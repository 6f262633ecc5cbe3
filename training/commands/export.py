"""`passion export`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from training.errors import UserError


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    form: Annotated[str, typer.Option("--format", help="torchscript or onnx.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")],
    modalities: Annotated[
        str | None, typer.Option(help="The subset that the graph is for, such as flair+t2. Default: all.")
    ] = None,
) -> None:
    """Write one subset of a model as a graph for other runtimes, and check it against the network.

    In: x (1, P, D, H, W), float32, one window of the normalised scans of just that subset, in the task's order.

    Out: class probabilities (1, C, D, H, W). Normalisation, the sliding window and the geometry stay outside.

    Inside the file, as ONNX metadata or TorchScript extra files: card.json, the model's card, and graph.json, the
    subset, the window and the labels. A TorchScript graph is for the CPU.
    """
    if os.path.lexists(output):
        raise UserError(f"{output} exists: choose another name or remove it first")
    if not output.parent.is_dir():
        raise UserError(f"{output.parent} is no folder: make it first")
    from models.checkpoint import Checkpoint, CheckpointError
    from models.task import TaskError
    from training import atomic, window_graph

    if form not in window_graph.FORMATS:
        raise UserError(f"no format {form!r}: choose one of {', '.join(window_graph.FORMATS)}")
    try:
        loaded = Checkpoint.load(checkpoint)
        task = loaded.card.task
        mask = task.mask(task.names if modalities is None else map(task.canonical, modalities.split("+")))
    except CheckpointError as error:
        raise UserError(str(error)) from None
    except TaskError as error:
        raise UserError(f"--modalities {modalities}: {error}") from None
    graph = window_graph.export(loaded, mask, form)
    try:
        atomic.write_bytes(output, graph.content)
    except OSError as error:
        raise UserError(f"{output}: cannot write the graph ({error.strerror})") from None
    subset = "+".join(name for name, there in zip(task.names, mask, strict=True) if there)
    patch = "x".join(map(str, task.patch_size))
    print(
        f"{output}: {subset}, window of {patch} voxels; largest difference from the network on random input "
        f"{graph.difference:.1e}"
    )
