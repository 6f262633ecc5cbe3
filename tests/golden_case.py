"""Rebuilds the golden cases of tests/golden from their rules (see its README)."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


@dataclass
class GoldenCase:
    figures: dict[str, Any]
    x: torch.Tensor
    labels: torch.Tensor
    prob: np.ndarray
    stride: int

    @property
    def masks(self) -> list[list[bool]]:
        return self.figures["masks"]


def load_case(name: str) -> GoldenCase:
    figures = json.loads((GOLDEN / "networks" / f"{name}.json").read_text())
    arrays = np.load(GOLDEN / "networks" / f"{name}.npz")
    size, batch = figures["size"], len(figures["masks"])
    x = np.random.default_rng(figures["seed"]).standard_normal((batch, 4, size, size, size)).astype(np.float32)
    index = np.indices((size,) * 3).transpose(1, 2, 3, 0)
    labels = np.zeros((batch, size, size, size), np.int64)
    for b in range(batch):
        centre = np.array([0.5 + 0.05 * b, 0.45, 0.55 - 0.05 * b]) * size
        r = np.linalg.norm(index - centre, axis=-1) / size
        for limit, label in ((0.36, 2), (0.22, 3), (0.12, 1)):
            labels[b][r < limit] = label
    if figures["drop_et"]:
        labels[0][labels[0] == 3] = 1
    prob = arrays["prob"]
    return GoldenCase(figures, torch.from_numpy(x), torch.from_numpy(labels), prob, size // prob.shape[-1])


def fill_weights(network: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in network.state_dict().items():
            z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(parameter.shape))
            if name.endswith(".bias"):
                value = 0.05 * z
            elif name.endswith(".weight") and z.ndim == 1:
                value = 1 + 0.1 * z
            elif name.endswith(".weight"):
                value = z * np.sqrt(2 / np.prod(z.shape[1:]))
            else:
                value = 0.5 * z
            parameter.copy_(torch.from_numpy(value.astype(np.float32)))
