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

import torch
from torch import Tensor

from models.backbone import Backbone, Features, Fused, Mask
from training.passion.distillation import SoftTargets, pixel_wise, semantic_wise, similarity
from training.passion.losses import Truth, deep_supervision, probabilities, supervised
from training.passion.objective import Coefficients, Terms, in_all, matrix

Weigh = Callable[[Tensor, Tensor], Coefficients]
"""From `dist` (B, K) and `mask` (B, K) of a batch to the weights of its other losses."""


def staged(
    network: Backbone,
    x: Tensor,
    labels: Tensor,
    masks: Sequence[Mask],
    classes: int,
    weigh: Weigh,
    *,
    present: Sequence[Mask] | None = None,
    distil: bool = True,
) -> Terms:
    """`terms`, and the backward pass of the total that `weigh` makes of them: adds to the parameters' gradients.

    Arguments as `terms`; `weigh` is called once. The terms come without graph and without `samples`.
    """
    present = masks if present is None else present
    truths = [Truth.of(own, classes, x.dtype) for own in labels]
    counted = in_all(truths)
    samples = []
    for b, truth in enumerate(truths):
        sample = _Sample(network, x[b : b + 1], truth, masks[b], present[b])
        sample.run(counted, distil)
        samples.append(sample)
    dist = matrix([s.dist for s in samples])
    mask = torch.tensor([s.mask for s in samples], device=x.device)
    weights = weigh(dist, mask)
    for sample in samples:
        sample.undo(weights)
    return Terms(
        fuse=torch.stack([s.fuse for s in samples]),
        prm=torch.stack([s.prm for s in samples]),
        sep=matrix([s.sep for s in samples]),
        kl=matrix([s.kl for s in samples]),
        proto=matrix([s.proto for s in samples]),
        dist=dist,
        mask=mask,
        present=torch.tensor([s.present for s in samples], device=x.device),
        samples=[],
    )


class _Sample:
    """One sample on its way through the stages."""

    def __init__(self, network: Backbone, x: Tensor, truth: Truth, mask: Mask, present: Mask) -> None:
        self.network, self.truth = network, truth
        self.mask, self.present = tuple(mask), tuple(present)
        self.fuse = self.prm = x.new_zeros(())
        self.sep, self.kl, self.proto, self.dist = ([x.new_zeros(())] * len(self.mask) for _ in range(4))
        self._features = network.encode(x, present)
        self._leaves: Features = [[None if f is None else _collecting(f) for f in level] for level in self._features]
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
        teacher.undo((1.0, sure))
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
            path.undo((1.0, path.sure), (of_kl[k], path.kl), (of_proto[k], path.proto))
            del path
        for k, is_there in enumerate(self.present):
            if is_there:
                self.sep[k] = self._separate(k, of_sep[k])
                leaves = [level[k] for level in self._leaves]
                for level in self._leaves:
                    level[k] = None
                _undo([level[k] for level in self._features], [None if f is None else f.grad for f in leaves])
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
                (weight * loss).backward()
        return loss.detach()


Gradients = list[Tensor | None]


class _Path:
    """One run of the fused decoder, cut off from the losses."""

    def __init__(self, fused: Fused) -> None:
        self.fused = fused
        """With graph."""
        self.leaves = Fused(_leaf(fused.logits), _leaf(fused.feature), [_leaf(d) for d in fused.deep])
        """The same values without; they collect the losses' gradients."""
        self.sure: Gradients = []
        """Gradients of losses with weight 1, by output."""
        self.kl: Gradients = []
        self.proto: Gradients = []

    def collect(self, losses: Iterable[Tensor]) -> Tensor:
        """Undo losses of the leaves, each as soon as it is there; their sum."""
        values = []
        for loss in losses:
            loss.backward()
            values.append(loss.detach())
        return torch.stack(values).sum()

    def taken(self) -> Gradients:
        """What the leaves have collected; they start anew."""
        leaves = _outputs(self.leaves)
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return gradients

    def undo(self, *weighted: tuple[float, Gradients]) -> None:
        """Run the path's backward pass on a weighted sum of gradients."""
        sums: Gradients = [None] * len(_outputs(self.fused))
        for weight, gradients in weighted:
            for i, gradient in enumerate(gradients):
                if gradient is not None and weight != 0:
                    so_far = sums[i]
                    sums[i] = gradient.mul_(weight) if so_far is None else so_far.add_(gradient, alpha=weight)
        _undo(_outputs(self.fused), sums)


def _outputs(fused: Fused) -> list[Tensor]:
    return [fused.logits, fused.feature, *fused.deep]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _collecting(x: Tensor) -> Tensor:
    """A leaf whose gradient has memory of its own.

    Otherwise autograd makes the first gradient that comes the leaf's, and that may be a view of one that a parameter
    took as its own too, as mmFormer's positions do: what is added to one is then added to both.
    """
    leaf = _leaf(x)
    leaf.grad = torch.zeros_like(x)
    return leaf


def _undo(outputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if y is not None and g is not None]
    if pairs:
        torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
