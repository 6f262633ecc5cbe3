"""The precision of a network's arithmetic: float32, or bfloat16 for convolutions and matrix products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from models.backbone import Backbone, Features, Fused, Mask

PRECISIONS = ("float32", "bfloat16")


class PrecisionError(ValueError):
    """A precision that is unknown, or that a device has no arithmetic of. The message says what to use."""


def check_precision(precision: str, device: str | torch.device) -> None:
    """Raises `PrecisionError`."""
    device = torch.device(device)
    if precision not in PRECISIONS:
        raise PrecisionError(f"precision {precision!r} is unknown: use {' or '.join(PRECISIONS)}")
    if precision == "bfloat16" and not _has_bfloat16(device):
        raise PrecisionError(f"the device {str(device)!r} has no bfloat16 arithmetic: use precision float32")


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def arithmetic(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Within it, networks compute in this precision. Weights stay float32, and so do the sums of norms."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def exact(device: torch.device) -> AbstractContextManager[None]:
    """Within it, operations compute in the precision of what they are given."""
    if torch.compiler.is_compiling():  # it would take autocast for off from here on; what is given is as wanted
        return nullcontext()
    return torch.autocast(device.type if device.type == "cuda" else "cpu", enabled=False)


def as_wanted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the precision that `arithmetic` wants of the operation at hand: the same where it wants none."""
    kind = tensors[0].device.type
    if kind not in {"cpu", "cuda"} or not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(_cast(t, torch.get_autocast_dtype(kind)) for t in tensors)


_Casts = dict[tuple[int, bool], tuple[Tensor, Tensor]]
_casts: ContextVar[_Casts | None] = ContextVar("casts", default=None)


@contextmanager
def weights_stay() -> Iterator[None]:
    """Within it no weight changes, so `as_wanted` brings each to its precision once, however many paths read it."""
    token = _casts.set({})
    try:
        yield
    finally:
        _casts.reset(token)


def _cast(x: Tensor, precision: torch.dtype) -> Tensor:
    kept = _casts.get()
    if kept is None or x.dtype == precision or not isinstance(x, nn.Parameter):
        return x.to(precision)
    key = (id(x), torch.is_grad_enabled())
    if key not in kept:
        # A GPU convolves channels last.
        layout = torch.channels_last_3d if x.is_cuda and x.dim() == 5 else torch.preserve_format
        kept[key] = (x, x.to(precision, memory_format=layout))
    return kept[key][1]


def single(x: Tensor) -> Tensor:
    """x in float32 where its precision is less, else x."""
    return x.float() if x.dtype in {torch.bfloat16, torch.float16} else x


class InPrecision:
    """A backbone that computes in a precision. Features stay in it; what losses read comes in float32."""

    def __init__(self, network: Backbone, precision: str) -> None:
        self._network = network
        self._precision = precision

    def cast(self, weights: Sequence[Tensor]) -> None:
        """Bring weights of convolutions to the precision at once, where they stay. For streams of a GPU that share
        them: what one made another could read before it is there."""
        with arithmetic(self._precision, weights[0].device):
            as_wanted(*(w for w in weights if w.dim() in {1, 5}))

    def encode(self, x: Tensor, mask: Mask) -> Features:
        """See `Backbone.encode`."""
        with arithmetic(self._precision, x.device):
            return self._network.encode(x, mask)

    def fuse(self, features: Features, mask: Mask) -> Fused:
        """See `Backbone.fuse`."""
        with arithmetic(self._precision, _device(features)):
            fused = self._network.fuse(features, mask)
        return Fused(single(fused.logits), single(fused.feature), [single(d) for d in fused.deep])

    def separate(self, features: Features) -> list[Tensor | None]:
        """See `Backbone.separate`."""
        with arithmetic(self._precision, _device(features)):
            separate = self._network.separate(features)
        return [None if logits is None else single(logits) for logits in separate]


def _device(features: Sequence[Sequence[Tensor | None]]) -> torch.device:
    return next(f.device for level in features for f in level if f is not None)
