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

A modality's encoder, student and separate path read and write no other's features: so all modalities may be at the same
stage at once, see `Branches`. Gradients are those of `terms` and `backward`, but for the order in which they are added
up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.backbone import Backbone, Features, Fused, Mask
from training.passion.branches import Apart, in_turn
from training.passion.distillation import SoftTargets, pixel_wise, semantic_wise
from training.passion.losses import Truth, deep_supervision, probabilities, supervised
from training.passion.objective import Coefficients, Terms, in_all, matrix
from training.passion.similarity import Counted, similarity

Weights = Sequence[float] | Sequence[Tensor]
"""By modality. Where one is a number and 0, nothing is computed for it."""
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
    counted: Counted | None = None,
    apart: Apart = in_turn,
) -> tuple[Terms, dict[int, Tensor]]:
    """`terms`, and the gradients of the total that `weigh` makes of them, by index in `parameters` where there are any.

    Arguments as `terms`; `weigh` is called once. The terms come without graph and without `samples`. `apart` runs what
    modalities do without each other.
    """
    present = masks if present is None else present
    truths = [Truth.of(own, classes, x.dtype) for own in labels]
    if counted is None:
        counted = in_all(truths)
    gradients = Gradients(parameters)
    samples = []
    for b, truth in enumerate(truths):
        sample = StagedSample(network, gradients, x[b : b + 1], truth, masks[b], present[b], apart)
        sample.run(counted, distil)
        samples.append(sample)
    losses = Terms(
        **figures(samples),
        mask=torch.tensor([s.mask for s in samples], device=x.device),
        present=torch.tensor([s.present for s in samples], device=x.device),
        samples=[],
    )
    weights = weigh(losses)
    by_modality = [w.tolist() for w in (weights.sep, weights.kl, weights.proto)]
    for sample in samples:
        sample.undo(*by_modality)
    return replace(losses, sep=matrix([s.sep for s in samples])), gradients.found


def figures(samples: Sequence[StagedSample]) -> dict[str, Tensor]:
    """The losses of samples that have run, by their names in `Terms`."""
    return {
        "fuse": torch.stack([s.fuse for s in samples]),
        "prm": torch.stack([s.prm for s in samples]),
        **{name: matrix([getattr(s, name) for s in samples]) for name in ("sep", "kl", "proto", "dist")},
    }


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
        torch._foreach_mul_(gradients, gradient)
        return None, None, *gradients


class _Assigned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, _some: Tensor, parameters: list[Tensor], gradients: list[Tensor]) -> Tensor:
        ctx.parameters, ctx.gradients = parameters, gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        torch._foreach_mul_(ctx.gradients, gradient)
        for parameter, own in zip(ctx.parameters, ctx.gradients, strict=True):
            parameter.grad = own
        ctx.parameters = ctx.gradients = None
        return None, None, None, None


def assigning(total: Tensor, parameters: Sequence[Tensor], gradients: dict[int, Tensor]) -> Tensor:
    """As `with_gradients`, but they take the place of what a weight had, and no hook hears of them: a fraction of the
    time for weights by the hundred."""
    own = list(gradients)
    known: Tensor = _Assigned.apply(total, parameters[own[0]], [parameters[i] for i in own], list(gradients.values()))
    return known


Found = list[tuple[int, Tensor]]
"""Gradients, each with its parameter's index."""


class Gradients:
    """Gradients of parameters, added up over several backward passes."""

    def __init__(self, parameters: Sequence[Tensor], zeros: Sequence[Tensor] | None = None) -> None:
        """`zeros`, in the parameters' shapes, are what they are added up in; copies of the first ones by default."""
        self._parameters = list(parameters)
        self._zeros = zeros
        self.found: dict[int, Tensor] = {}

    def undo(
        self, outputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None], leaves: Sequence[Tensor] = ()
    ) -> Found:
        """A backward pass from the outputs whose gradient is there. The leaves collect theirs; the parameters' wait for
        `add`."""
        pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if y is not None and g is not None]
        if not pairs:
            return []
        ends = [*self._parameters, *leaves]
        found = torch.autograd.grad([y for y, _ in pairs], ends, [g for _, g in pairs], allow_unused=True)
        of_leaves = [(x, g) for x, g in zip(leaves, found[len(self._parameters) :], strict=True) if g is not None]
        _add([(x.grad, g) for x, g in of_leaves if x.grad is not None])
        for x, g in of_leaves:
            if x.grad is None:
                x.grad = g.clone()
        return [(i, g) for i, g in enumerate(found[: len(self._parameters)]) if g is not None]

    def add(self, found: Found) -> None:
        """What `undo` gave."""
        if self._zeros is not None:
            self.found |= {i: self._zeros[i] for i, _ in found if i not in self.found}
        # Two of them may be views of one memory, as those of mmFormer's tokens and positions are: so what they are
        # added up in must be their own.
        _add([(self.found[i], g) for i, g in found if i in self.found])
        self.found |= {i: g.clone(memory_format=torch.contiguous_format) for i, g in found if i not in self.found}


def _add(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Add the second to the first, many at once; on a GPU that needs one layout for both."""
    if pairs:
        parts = [g if not g.is_cuda or g.stride() == to.stride() else g.contiguous() for to, g in pairs]
        torch._foreach_add_([to for to, _ in pairs], parts)


class StagedSample:
    """One sample on its way through the stages."""

    def __init__(
        self,
        network: Backbone,
        gradients: Gradients,
        x: Tensor,
        truth: Truth,
        mask: Mask,
        present: Mask,
        apart: Apart = in_turn,
    ) -> None:
        """Stage 1."""
        self.network, self.gradients, self.truth = network, gradients, truth
        self.mask, self.present, self._apart = tuple(mask), tuple(present), apart
        self.fuse = self.prm = x.new_zeros(())
        self.sep, self.kl, self.proto, self.dist = ([x.new_zeros(())] * len(self.mask) for _ in range(4))
        of_modality: dict[int, Features] = {}
        self._apart([partial(self._encode, x, k) for k in _those(self.present)], of_modality.update)
        self._features: Features = [
            [of_modality[k][level][k] if k in of_modality else None for k in range(len(self.mask))]
            for level in range(max(map(len, of_modality.values())))
        ]
        self._leaves: Features = [[None if f is None else _leaf(f) for f in level] for level in self._features]
        self._paths: dict[int, _Path] = {}
        """By modality: its student, or the teacher where that is the same."""

    def run(self, counted: Counted, distil: bool) -> None:
        """Stages 2 and 3."""
        teacher = _Path(self.network.fuse(self._leaves, self.mask))
        cut = teacher.leaves
        self.fuse = teacher.collect([supervised(probabilities(cut.logits), self.truth)])
        self.prm = teacher.collect(deep_supervision(cut.logits, cut.deep, self.truth))
        sure = teacher.taken()
        targets = SoftTargets.of(cut) if distil else None
        there = _those(self.mask)
        if targets and len(there) == 1:
            # Its own teacher: every value is 0, but the clamp leaves the pixel-wise term a gradient, as released.
            self.kl[there[0]] = teacher.collect(pixel_wise(cut, targets))
            teacher.kl, teacher.sure = teacher.taken(), sure
            self._paths[there[0]] = teacher
            return
        with torch.no_grad():
            goal = similarity(cut.feature, self.truth, counted) if distil else None
        self.gradients.add(self._undo_path(teacher, there, (1.0, sure)))
        del teacher, cut, sure
        if targets is None or goal is None:
            return
        self._apart([partial(self._run_student, k, targets, goal, counted) for k in there], self._paths.update)

    def undo(self, of_sep: Weights, of_kl: Weights, of_proto: Weights) -> None:
        """Stages 4 to 6, with the losses' weights by modality."""
        students, add = list(self._paths), self.gradients.add
        self._apart([partial(self._undo_student, k, of_kl[k], of_proto[k]) for k in students], add)
        present = _those(self.present)
        self._apart([partial(self._separate, k, of_sep[k]) for k in present], add)
        self._apart([partial(self._undo_encoder, k) for k in present], add)
        self._leaves.clear()  # not before all are through, see `Branches`

    def _encode(self, x: Tensor, k: int) -> dict[int, Features]:
        return {k: self.network.encode(x, self._alone(k))}

    def _run_student(self, k: int, targets: SoftTargets, goal: Tensor, counted: Counted) -> dict[int, _Path]:
        """Stage 3 of a modality; `goal` (counted, V) is the teacher's similarity."""
        student = _Path(self.network.fuse(self._leaves, self._alone(k)))
        self.kl[k] = student.collect(pixel_wise(student.leaves, targets))
        student.kl = student.taken()
        proto, self.dist[k] = semantic_wise(similarity(student.leaves.feature, self.truth, counted), goal, counted)
        self.proto[k] = student.collect([proto])
        student.proto = student.taken()
        student.leaves = student.fused  # their values are not needed any more
        return {k: student}

    def _undo_student(self, k: int, of_kl: float | Tensor, of_proto: float | Tensor) -> Found:
        """Stage 4 of a modality."""
        path = self._paths.pop(k)
        return self._undo_path(path, [k], (1.0, path.sure), (of_kl, path.kl), (of_proto, path.proto))

    def _separate(self, k: int, weight: float | Tensor) -> Found:
        """Stage 5 of a modality."""
        found: Found = []
        counts = not _is_zero(weight)
        alone: Features = [[f if i == k else None for i, f in enumerate(level)] for level in self._leaves]
        with torch.set_grad_enabled(counts):
            logits = self.network.separate(alone)[k]
            assert logits is not None
            loss = supervised(probabilities(logits), self.truth)
            if counts:
                own = [f for level in alone for f in level if f is not None]
                of_loss = weight if isinstance(weight, Tensor) else loss.new_tensor(weight)
                found = self.gradients.undo([loss], [of_loss], own)
        self.sep[k] = loss.detach()
        return found

    def _undo_encoder(self, k: int) -> Found:
        """Stage 6 of a modality."""
        features = [level[k] for level in self._features]
        of_features = [None if f is None else f.grad for f in (level[k] for level in self._leaves)]
        for level in self._features:
            level[k] = None
        return self.gradients.undo(features, of_features)

    def _undo_path(
        self, path: _Path, of_modalities: Sequence[int], *weighted: tuple[float | Tensor, ByOutput]
    ) -> Found:
        """`of_modalities`: whose features the path has read."""
        leaves = [f for level in self._leaves for k in of_modalities if (f := level[k]) is not None]
        return self.gradients.undo(_outputs(path.fused), path.summed(*weighted), leaves)

    def _alone(self, k: int) -> Mask:
        return [i == k for i in range(len(self.mask))]


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

    def summed(self, *weighted: tuple[float | Tensor, ByOutput]) -> ByOutput:
        """The weighted sum of gradients by output; writes into them."""
        sums: ByOutput = [None] * len(_outputs(self.fused))
        for weight, gradients in weighted:
            for i, gradient in enumerate(gradients):
                if gradient is not None and not _is_zero(weight):
                    so_far = sums[i]
                    if so_far is None:
                        sums[i] = gradient.mul_(weight)
                    elif isinstance(weight, Tensor):
                        so_far.addcmul_(gradient, weight)
                    else:
                        so_far.add_(gradient, alpha=weight)
        return sums


def _those(mask: Mask) -> list[int]:
    return [k for k, is_there in enumerate(mask) if is_there]


def _is_zero(weight: float | Tensor) -> bool:
    """Whether what is weighted can be left out. A tensor may be on a GPU, which is not waited for."""
    return not isinstance(weight, Tensor) and weight == 0


def _outputs(fused: Fused) -> list[Tensor]:
    return [fused.logits, fused.feature, *fused.deep]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()
