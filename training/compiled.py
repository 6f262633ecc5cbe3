"""torch.compile where no subset of modalities makes it compile anew."""

from __future__ import annotations

import os
import shutil
from typing import Any

from training.errors import UserError


def compile_shared(network: Any, backend: str = "inductor") -> None:
    """Compile the encoders and the separate decoder, in place: one graph for all encoders, which differ in weights
    alone, and two for the decoder, with gradients and without. What the fused decoder computes depends on the subset,
    so it stays as it is.

    Raises `UserError` where there is no C++ compiler.
    """
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("compile: there is no C++ compiler here (g++, or what CXX names): install one, or leave it out")
    for name, part in network.named_children():
        if name.endswith("_encoder") or name == "decoder_sep":
            part.compile(backend=backend, dynamic=False, fullgraph=True)
