"""`Captured`: `staged` for a GPU, recorded once for every subset of modalities and then replayed.

A step is some ten thousand small operations, and to start one takes Python longer than a GPU takes to do it. A CUDA
graph starts them all at once. Of every subset the first step runs as it is, which lets libraries choose and build what
they need, and the second is recorded. Two graphs each: stages 1 to 3 of `staged`, up to the losses, and 4 to 6, from
their weights on; between them the method weighs the losses, on the CPU if it wants to.

What a graph computes cannot depend on values: so classes that a crop lacks are multiplied by 0 instead of left out, and
losses whose weight is 0 are undone, too. What modalities do without each other are branches of a graph. The results are
those of `staged`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from models.backbone import Mask
from models.precision import InPrecision
from training.passion.branches import Branches
from training.passion.losses import Truth
from training.passion.objective import Terms
from training.passion.staged import Gradients, StagedSample, Weigh, figures, staged


@dataclass(frozen=True)
class _Graphs:
    """Of one subset."""

    run: Any
    """From the images and labels to the losses."""
    losses: Terms
    """What it leaves; `sep` only after `undo`."""
    undo: Any
    """From the losses' weights to the gradients."""
    sep: Tensor


class Captured:
    """Steps of one sample on one GPU. Not for several processes: what they exchange is not recorded."""

    def __init__(
        self, network: InPrecision, parameters: Sequence[Tensor], modalities: int, classes: int, distil: bool
    ) -> None:
        self._network, self._parameters = network, list(parameters)
        self._classes, self._distil = classes, distil
        self._apart = Branches(self._parameters[0].device, modalities)
        self._seen: set[tuple[Mask, Mask]] = set()
        self._graphs: dict[tuple[Mask, Mask], _Graphs] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._gradients = [torch.zeros_like(p) for p in self._parameters]
        """What all graphs write, as they are never under way at the same time."""
        self._x = self._labels = self._weights = torch.empty(0)

    def __call__(
        self, x: Tensor, labels: Tensor, mask: Mask, present: Mask, weigh: Weigh
    ) -> tuple[Terms, dict[int, Tensor]]:
        """As `staged`, of a batch of one. What it gives holds until the next call, which writes over it; from the
        second step of a subset on, that is every parameter's gradient, 0 where there is none."""
        key = (tuple(mask), tuple(present))
        if key not in self._seen:
            self._seen.add(key)
            self._network.cast(self._parameters)
            return staged(
                self._network,
                self._parameters,
                x,
                labels,
                [mask],
                self._classes,
                weigh,
                present=[present],
                distil=self._distil,
                counted=_there(Truth.of(labels[0], self._classes, x.dtype)),
                apart=self._apart,
            )
        if not self._graphs:
            self._x, self._labels = torch.empty_like(x), torch.empty_like(labels)
            self._weights = torch.zeros(3, len(mask), device=x.device)
        self._x.copy_(x)
        self._labels.copy_(labels)
        graphs = self._graphs.get(key)
        if graphs is None:
            graphs = self._graphs[key] = self._record(*key)
        graphs.run.replay()
        weights = weigh(graphs.losses)
        self._weights.copy_(torch.stack([weights.sep, weights.kl, weights.proto]))
        graphs.undo.replay()
        return replace(graphs.losses, sep=graphs.sep), dict(enumerate(self._gradients))

    def _record(self, mask: Mask, present: Mask) -> _Graphs:
        """Recording computes nothing yet."""
        where = self._x.device
        masks = torch.tensor([list(mask)], device=where), torch.tensor([list(present)], device=where)
        run, undo = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        gradients = Gradients(self._parameters, self._gradients)
        with self._recording(run):
            torch._foreach_zero_(self._gradients)
            self._network.cast(self._parameters)
            truth = Truth.of(self._labels[0], self._classes, self._x.dtype)
            sample = StagedSample(self._network, gradients, self._x, truth, mask, present, self._apart)
            sample.run(_there(truth), self._distil)
            losses = Terms(**figures([sample]), mask=masks[0], present=masks[1], samples=[])
        with self._recording(undo):
            sample.undo(*(row.unbind() for row in self._weights))
            sep = torch.stack(sample.sep)[None]
        return _Graphs(run, losses, undo, sep)

    def _recording(self, graph: Any) -> torch.cuda.graph:
        # On the stream of the steps, if that is not the default one, which cannot be recorded: autograd has a node for
        # each weight, that stays on the stream it was made on. The loader's thread, which pins batches meanwhile, is
        # none of the recording's business.
        stream = torch.cuda.current_stream(self._x.device)
        own = None if stream == torch.cuda.default_stream(self._x.device) else stream
        return torch.cuda.graph(graph, pool=self._pool, stream=own, capture_error_mode="thread_local")


def _there(truth: Truth) -> Tensor:
    """(C,) with 1 for the classes of a sample, else 0."""
    return (truth.counts > 0).to(truth.counts)
