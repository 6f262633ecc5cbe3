"""The objective's backward pass in stages: the graph of one path after the other, instead of all of them at once.

`terms` leaves one graph of all paths to autograd, which holds encoders, teacher, every student and every separate path
in memory until the last loss is known. Here each path is cut off at the encoders' features and at its own outputs, and
so can be undone alone:

1. The encoders run. They are kept to the end.
2. The teacher runs. Its losses have weight 1, so it is undone at once; its soft targets and similarity map stay.
3. The students run, and their losses are undone down to the students' outputs, a few maps. The students are kept: the
   weight of `proto` depends on which modalities lag, and that on the distances of all students.
4. The students are undone, one by one.
5. The separate paths run and are undone, one by one; without gradients for modalities whose `sep` has weight 0.
6. The encoders are undone, one by one.

Gradients are those of `terms` and `backward`, but for the order in which they are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.backbone import Backbone, Features, Fused, Mask
from training.passion.distillation import SoftTargets, pixel_wise, semantic_wise, similarity
from training.passion.losses import Truth, deep_supervision, probabilities, supervised
from training.passion.objective import Coefficients, Terms, in_all, matrix

Weigh = Callable[[Terms], Coefficients]
"""From a batch's terms, in which `sep` is still 0, to their weights."""
ByOutput = list[Tensor | None]
"""Gradients of a path's outputs, in the order of `_outputs`."""


def staged(
    network: Backbone,
    parameters: Sequence[Tensor],
    x: Tensor,
    labels: Tensor,
    masks: Sequence[Mask],
    classes: int,
    weigh: Weigh,
    *,
    present: Sequence[Mask] | None = None,
    distil: bool = True,
    counted: Sequence[int] | None = None,
) -> tuple[Terms, dict[int, Tensor]]:
    """`terms`, and the gradients of the total that `weigh` makes of them, by index in `parameters` where there are any.

    Arguments as `terms`; `weigh` is called once. The terms come without graph and without `samples`.
    """
    present = masks if present is None else present
    truths = [Truth.of(own, classes, x.dtype) for own in labels]
    counted = in_all(truths) if counted is None else counted
    gradients = _Gradients(parameters)
    samples = []
    for b, truth in enumerate(truths):
        sample = _Sample(network, gradients, x[b : b + 1], truth, masks[b], present[b])
        sample.run(counted, distil)
        samples.append(sample)
    losses = Terms(
        fuse=torch.stack([s.fuse for s in samples]),
        prm=torch.stack([s.prm for s in samples]),
        sep=matrix([s.sep for s in samples]),
        kl=matrix([s.kl for s in samples]),
        proto=matrix([s.proto for s in samples]),
        dist=matrix([s.dist for s in samples]),
        mask=torch.tensor([s.mask for s in samples], device=x.device),
        present=torch.tensor([s.present for s in samples], device=x.device),
        samples=[],
    )
    weights = weigh(losses)
    for sample in samples:
        sample.undo(weights)
    return replace(losses, sep=matrix([s.sep for s in samples])), gradients.found


def with_gradients(total: Tensor, parameters: Sequence[Tensor], gradients: dict[int, Tensor]) -> Tensor:
    """`total`, whose backward pass hands out these gradients, to hooks as those of DistributedDataParallel too."""
    known: Tensor = _Known.apply(total, list(gradients.values()), *(parameters[i] for i in gradients))
    return known


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor], *_parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(g.mul_(gradient) for g in gradients)


class _Gradients:
    """Gradients of parameters, added up over several backward passes."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self.found: dict[int, Tensor] = {}

    def undo(
        self, outputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None], leaves: Sequence[Tensor] = ()
    ) -> None:
        """A backward pass from the outputs whose gradient is there to the parameters and the leaves."""
        pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if y is not None and g is not None]
        if not pairs:
            return
        ends = [*self._parameters, *leaves]
        found = torch.autograd.grad([y for y, _ in pairs], ends, [g for _, g in pairs], allow_unused=True)
        for i, gradient in enumerate(found):
            if gradient is None:
                continue
            # Two of them may be views of one memory, as those of mmFormer's tokens and positions are: so what they are
            # added up in must be their own.
            if i >= len(self._parameters):
                leaf = ends[i]
                leaf.grad = gradient.clone() if leaf.grad is None else leaf.grad.add_(gradient)
            elif i in self.found:
                self.found[i].add_(gradient)
            else:
                self.found[i] = gradient.clone()


class _Sample:
    """One sample on its way through the stages."""

    def __init__(
        self, network: Backbone, gradients: _Gradients, x: Tensor, truth: Truth, mask: Mask, present: Mask
    ) -> None:
        self.network, self.gradients, self.truth = network, gradients, truth
        self.mask, self.present = tuple(mask), tuple(present)
        self.fuse = self.prm = x.new_zeros(())
        self.sep, self.kl, self.proto, self.dist = ([x.new_zeros(())] * len(self.mask) for _ in range(4))
        self._features = network.encode(x, present)
        self._leaves: Features = [[None if f is None else _leaf(f) for f in level] for level in self._features]
        self._paths: dict[int, _Path] = {}
        """By modality: its student, or the teacher where that is the same."""

    def run(self, counted: Sequence[int], distil: bool) -> None:
        """Stages 2 and 3."""
        teacher = _Path(self.network.fuse(self._leaves, self.mask))
        cut = teacher.leaves
        self.fuse = teacher.collect([supervised(probabilities(cut.logits), self.truth)])
        self.prm = teacher.collect(deep_supervision(cut.logits, cut.deep, self.truth))
        sure = teacher.taken()
        targets = SoftTargets.of(cut) if distil else None
        there = [k for k, is_there in enumerate(self.mask) if is_there]
        if targets and len(there) == 1:
            # Its own teacher: every value is 0, but the clamp leaves the pixel-wise term a gradient, as released.
            self.kl[there[0]] = teacher.collect(pixel_wise(cut, targets))
            teacher.kl, teacher.sure = teacher.taken(), sure
            self._paths[there[0]] = teacher
            return
        with torch.no_grad():
            goal = similarity(cut.feature, self.truth, counted) if distil else None
        self._undo_path(teacher, (1.0, sure))
        del teacher, cut, sure
        if targets is None or goal is None:
            return
        for k in there:
            student = _Path(self.network.fuse(self._leaves, [i == k for i in range(len(self.mask))]))
            self.kl[k] = student.collect(pixel_wise(student.leaves, targets))
            student.kl = student.taken()
            proto, self.dist[k] = semantic_wise(similarity(student.leaves.feature, self.truth, counted), goal)
            self.proto[k] = student.collect([proto])
            student.proto = student.taken()
            student.leaves = student.fused  # their values are not needed any more
            self._paths[k] = student

    def undo(self, weights: Coefficients) -> None:
        """Stages 4 to 6, with weights (K,) of the losses."""
        of_sep, of_kl, of_proto = (w.tolist() for w in (weights.sep, weights.kl, weights.proto))
        for k in list(self._paths):
            path = self._paths.pop(k)
            self._undo_path(path, (1.0, path.sure), (of_kl[k], path.kl), (of_proto[k], path.proto))
            del path
        for k, is_there in enumerate(self.present):
            if is_there:
                self.sep[k] = self._separate(k, of_sep[k])
                leaves = [level[k] for level in self._leaves]
                for level in self._leaves:
                    level[k] = None
                of_leaves = [None if f is None else f.grad for f in leaves]
                self.gradients.undo([level[k] for level in self._features], of_leaves)
                for level in self._features:
                    level[k] = None

    def _separate(self, k: int, weight: float) -> Tensor:
        """`sep` of a modality."""
        alone: Features = [[f if i == k else None for i, f in enumerate(level)] for level in self._leaves]
        with torch.set_grad_enabled(weight != 0):
            logits = self.network.separate(alone)[k]
            assert logits is not None
            loss = supervised(probabilities(logits), self.truth)
            if weight != 0:
                own = [f for level in alone for f in level if f is not None]
                self.gradients.undo([loss], [loss.new_tensor(weight)], own)
        return loss.detach()

    def _undo_path(self, path: _Path, *weighted: tuple[float, ByOutput]) -> None:
        leaves = [f for level in self._leaves for f in level if f is not None]
        self.gradients.undo(_outputs(path.fused), path.summed(*weighted), leaves)


class _Path:
    """One run of the fused decoder, cut off from the losses."""

    def __init__(self, fused: Fused) -> None:
        self.fused = fused
        """With graph."""
        self.leaves = Fused(_leaf(fused.logits), _leaf(fused.feature), [_leaf(d) for d in fused.deep])
        """The same values without; they collect the losses' gradients."""
        self.sure: ByOutput = []
        """Gradients of losses with weight 1, by output."""
        self.kl: ByOutput = []
        self.proto: ByOutput = []

    def collect(self, losses: Iterable[Tensor]) -> Tensor:
        """Undo losses of the leaves, each as soon as it is there; their sum."""
        values = []
        for loss in losses:
            loss.backward()
            values.append(loss.detach())
        return torch.stack(values).sum()

    def taken(self) -> ByOutput:
        """What the leaves have collected; they start anew."""
        leaves = _outputs(self.leaves)
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return gradients

    def summed(self, *weighted: tuple[float, ByOutput]) -> ByOutput:
        """The weighted sum of gradients by output; writes into them."""
        sums: ByOutput = [None] * len(_outputs(self.fused))
        for weight, gradients in weighted:
            for i, gradient in enumerate(gradients):
                if gradient is not None and weight != 0:
                    so_far = sums[i]
                    sums[i] = gradient.mul_(weight) if so_far is None else so_far.add_(gradient, alpha=weight)
        return sums


def _outputs(fused: Fused) -> list[Tensor]:
    return [fused.logits, fused.feature, *fused.deep]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()
