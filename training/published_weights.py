"""Weights that others trained: a file of tensors into one of our networks, and no pickle is ever run."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.backbones import BACKBONES, build
from models.task import Task
from training.errors import UserError

StateDict: TypeAlias = dict[str, Tensor]
Shapes: TypeAlias = dict[str, tuple[int, ...]]

WRAPPERS = ("state_dict", "model", "model_state_dict", "network")
"""Keys under which training scripts keep the state dict beside the epoch and the optimiser."""
PREFIX = "module."
"""What torch's DataParallel puts before every name."""
DEEPEST = 3
"""Dictionaries around a state dict, at most."""
LARGEST_CROP = 256


def read_state_dict(path: Path) -> StateDict:
    """The tensors of a `.safetensors` file, or of one that `torch.save` wrote, by name and on the CPU.

    Takes a state dict as it is or inside a dictionary under one of `WRAPPERS`, with or without `module.` before every
    name. Raises `UserError` for anything else, and for a file that holds objects other than tensors and plain values:
    those would need their pickle run.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file of weights' if path.is_dir() else 'no such file'}")
    content = _unwrapped(_read(path))
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        found = f"has the keys {_some(content)}" if isinstance(content, Mapping) else f"is a {type(content).__name__}"
        raise UserError(f"{path}: no state dict in it, nor one under {', '.join(WRAPPERS)}: it {found}")
    foreign = [name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if foreign:
        raise UserError(f"{path}: not only tensors in the state dict: {_some(foreign)}; save it without them")
    tensors = dict(content)
    while all(name.startswith(PREFIX) for name in tensors):
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return tensors


def fitted(weights: StateDict, backbone: str, task: Task, width: int, source: Path) -> nn.Module:
    """A network with `weights` in place, as float32.

    Raises `UserError`, which names `source`, for a network that cannot be and for weights that are not exactly its
    own: first what to do, then a line for every name that is missing, unexpected or of another shape.
    """
    try:
        network = build(backbone, task, width)
    except ValueError as error:
        raise UserError(str(error)) from None
    _same_shapes(_shapes(weights), _shapes(network.state_dict()), backbone, task, width, source)
    odd = [name for name, tensor in weights.items() if not _plain(tensor)]
    if odd:
        raise UserError(f"{source}: these weights are not plain floating point numbers: {_some(odd)}")
    weights = {name: tensor.float() for name, tensor in weights.items()}
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{source}: these weights are not finite numbers (NaN or infinite): {_some(broken)}")
    network.load_state_dict(weights)
    return network.eval()


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that are refused in a moment
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot read the weights ({error.strerror or error})") from None
    except Exception as error:  # torch raises kinds of many sorts for what is not its own
        needed = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if needed is None:
            raise UserError(f"{path}: not a whole file of tensors as torch.save or safetensors write it") from None
        raise UserError(
            f"{path}: holds more than tensors ({_printable(needed[1])}), which only running its pickle would read, and "
            "that is never done here; whoever trusts the file can save its state dict alone"
        ) from None


def _unwrapped(content: Any) -> Any:
    for _ in range(DEEPEST):
        if isinstance(content, Mapping):
            inside = (content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping))
            content = next(inside, content)
    return content


def _shapes(weights: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _plain(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout is torch.strided and tensor.device.type == "cpu"


def _same_shapes(given: Shapes, wanted: Shapes, backbone: str, task: Task, width: int, source: Path) -> None:
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    other = [name for name in wanted if name in given and given[name] != wanted[name]]
    if not missing and not unexpected and not other:
        return
    names_differ = missing or unexpected
    remedy = _right_backbone(given, task, width) if names_differ else _right_crop(given, backbone, task, width)
    patch = "x".join(map(str, task.patch_size))
    lines = [
        f"{source}: does not fit {backbone} of width {width} for task {task.name} with crops of {patch}: "
        f"{len(missing)} names missing, {len(unexpected)} unexpected, {len(other)} of another shape; {remedy}",
        *(f"  missing: {name} {wanted[name]}" for name in missing),
        *(f"  unexpected: {_printable(name)} {given[name]}" for name in unexpected),
        *(f"  another shape: {name} {given[name]}, the network has {wanted[name]}" for name in other),
    ]
    raise UserError("\n".join(lines))


def _right_backbone(given: Shapes, task: Task, width: int) -> str:
    for name, entry in BACKBONES.items():
        if _shapes_of(name, task, 2 * entry.divisor, width).keys() == given.keys():
            return f"the names are those of {name}: give --backbone {name}"
    return "choose the backbone and the task that it was trained with"


def _right_crop(given: Shapes, backbone: str, task: Task, width: int) -> str:
    """The edge of the cube whose network has just these shapes: position embeddings have a row per token."""
    divisor = BACKBONES[backbone].divisor
    for edge in range(2 * divisor, LARGEST_CROP + 1, divisor):
        if _shapes_of(backbone, task, edge, width) == given:
            return f"it was trained on crops of {edge}x{edge}x{edge} voxels: give --crop {edge}"
    return "choose the --width, --crop and --task that it was trained with"


def _shapes_of(backbone: str, task: Task, edge: int, width: int) -> Shapes:
    """Of a network that is not made; none where this width cannot be."""
    try:
        with torch.device("meta"):
            network = build(backbone, task.model_copy(update={"patch_size": (edge,) * 3}), width)
    except ValueError:
        return {}
    return _shapes(network.state_dict())


def _printable(name: str) -> str:
    # Names come from the file, and some characters steer a terminal.
    return name if name.isprintable() else ascii(name)


def _some(names: Any) -> str:
    first = [_printable(str(name)) for name in names][:8]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")
