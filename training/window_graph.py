"""A checkpoint as one graph for other runtimes: one subset of modalities, one window, class probabilities."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.card import Card
from models.checkpoint import Checkpoint
from training.errors import UserError

TOLERANCE = 1e-4
"""Largest difference of a class probability that a graph may have from the network."""
INPUT, OUTPUT = "x", "probabilities"
OUTSIDE = (
    "One window of one patient. Outside the graph, and up to the caller: the scans on one grid of the task's "
    "orientation and spacing; each modality minus its mean, divided by its standard deviation, over the voxels where "
    "the sum of the modalities is positive; windows that overlap by half, their probabilities averaged; the way back "
    "to the patient's grid. Research software, not a medical device."
)


class Window(nn.Module):
    """A network with its subset of modalities fixed: (1, P, D, H, W) -> class probabilities (1, C, D, H, W)."""

    def __init__(self, network: nn.Module, mask: Sequence[bool]) -> None:
        super().__init__()
        self.network = network
        self.mask = tuple(mask)

    def forward(self, x: Tensor) -> Tensor:
        """`x`: normalised patches of the P modalities of the subset, in the task's order."""
        places = iter(range(x.shape[1]))
        # A backbone does not read the channels of missing modalities, so any will do: no tensor has to be made up.
        channels = [x[:, place : place + 1] for place in (next(places) if there else 0 for there in self.mask)]
        network: Any = self.network
        features = network.encode(torch.cat(channels, dim=1), self.mask)
        probabilities: Tensor = network.fuse(features, self.mask).logits.softmax(1)
        return probabilities


@dataclass(frozen=True)
class GraphFormat:
    """A file format: how to write a window with its notes (by name) into bytes, and how to compute with those."""

    write: Callable[[Window, Tensor, Mapping[str, str]], bytes]
    run: Callable[[bytes, Tensor], Tensor]


@dataclass(frozen=True)
class Graph:
    """An exported window."""

    content: bytes
    """The whole file, with `card.json` and `graph.json` inside."""
    difference: float
    """Largest difference of a class probability from the network's, on random input that the export did not see."""


def export(checkpoint: Checkpoint, mask: Sequence[bool], form: str) -> Graph:
    """One subset of a checkpoint, on the CPU, in one of `FORMATS`.

    The difference is measured with the file's own bytes, read back and run by the format's runtime. Raises `UserError`
    where the format cannot hold the backbone, or the difference is more than `TOLERANCE`.
    """
    card = checkpoint.card
    # Whoever runs a TorchScript file should not pay for gradients.
    window = Window(checkpoint.network, mask).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    shape = (1, sum(mask), *card.task.patch_size)
    example, other = (torch.randn(shape, generator=random) for _ in range(2))
    try:
        with torch.no_grad(), _quiet():
            content = FORMATS[form].write(window, example, notes(card, mask))
            got = FORMATS[form].run(content, other)
    except UserError:
        raise
    except Exception as error:  # exporters and runtimes raise kinds of their own for an operation they lack
        raise UserError(f"{card.backbone} cannot be written as {form}: {_root(error)}") from error
    with torch.no_grad():
        want = window(other)
    difference = (got - want).abs().max().item()
    if not difference <= TOLERANCE:  # NaN is not within it either
        raise UserError(
            f"{card.backbone} cannot be written as {form}: the class probabilities differ from the network's by "
            f"{difference:.1e}, more than {TOLERANCE:.0e}"
        )
    return Graph(content, difference)


def notes(card: Card, mask: Sequence[bool]) -> dict[str, str]:
    """What a file says of itself: `card.json`, the whole card, and `graph.json`, what goes in and what comes out."""
    task = card.task
    there = [name for name, is_there in zip(task.names, mask, strict=True) if is_there]
    graph = {
        "modalities": there,
        "patch_size": list(task.patch_size),
        "labels": [label.name for label in task.labels],
        "input": {"name": INPUT, "type": "float32", "shape": [1, len(there), *task.patch_size]},
        "output": {"name": OUTPUT, "type": "float32", "shape": [1, len(task.labels), *task.patch_size]},
        "outside": OUTSIDE,
    }
    return {"card.json": card.model_dump_json(), "graph.json": json.dumps(graph)}


def _write_torchscript(window: Window, example: Tensor, texts: Mapping[str, str]) -> bytes:
    # Without torch's own check, which runs the trace on the same input again: `export` compares on another one.
    traced = torch.jit.trace(window, (example,), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file, _extra_files=dict(texts))
    return file.getvalue()


def _run_torchscript(content: bytes, x: Tensor) -> Tensor:
    result: Tensor = torch.jit.load(io.BytesIO(content), map_location="cpu")(x)
    return result


def _write_onnx(window: Window, example: Tensor, texts: Mapping[str, str]) -> bytes:
    try:
        import onnxruntime  # noqa: F401  for the check, before minutes are spent on a graph
        import onnxscript  # noqa: F401  torch writes the graph with it
    except ImportError as error:
        raise UserError(f"onnx needs {error.name}, which is not installed: pip install 'passion-seg[export]'") from None
    program = torch.onnx.export(
        window, (example,), input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False
    )
    assert program is not None
    program.model.metadata_props.update(texts)
    content: bytes = program.model_proto.SerializeToString()
    return content


def _run_onnx(content: bytes, x: Tensor) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (result,) = session.run([OUTPUT], {INPUT: x.numpy()})
    return torch.from_numpy(result)


FORMATS: dict[str, GraphFormat] = {
    "torchscript": GraphFormat(_write_torchscript, _run_torchscript),
    "onnx": GraphFormat(_write_onnx, _run_onnx),
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks: that a value read off a shape stays as it is, which one window is meant to."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _root(error: BaseException) -> str:
    """The first line of the error that began it: the exporters wrap it in pages of advice."""
    while (cause := error.__cause__) is not None:
        error = cause
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
