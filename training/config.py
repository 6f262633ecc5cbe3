"""`TrainConfig`: one training run, read from YAML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.task import first_problem
from training.errors import UserError

Count = Annotated[int, Field(ge=1)]

Regime = Literal["idt", "idt_drop", "pdt"]
"""`idt`: every subject has one fixed mask. `idt_drop`: and every step draws a subset of what it has (modality dropout).
`pdt`: every subject is complete, and every step draws the subset that the fused path is given."""


Precision = Literal["float32", "bfloat16"]


class TrainConfig(BaseModel):
    """What `passion train` needs. Defaults are the published ones; paths are relative to the working directory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path
    """Output of `passion prepare`."""
    split: Path
    """Output of `passion split`: train.txt and missingness.csv."""
    out: Path
    """Run folder: checkpoint/, log.jsonl, tensorboard/."""
    name: str = "passion"
    description: str = ""
    backbone: str = "rfnet"
    """A name of the registry: `passion backbones`."""
    width: Count = 8
    regime: Regime = "idt"
    method: str = "passion"
    """`passion`, `none` for the backbone's own loss, an ablation or another balancing rule: `training.methods`."""
    epochs: Count = 300
    warmup_epochs: int = Field(default=0, ge=0)
    """Epochs with the separate paths only."""
    batch_size: Count = 1
    """Subjects that a process runs at a time. A step has batch_size x accumulate x processes of them."""
    accumulate: Count = 1
    """Batches of a process whose gradients add up to one step: a larger batch's result in the memory of this one."""
    learning_rate: float = Field(default=2e-4, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    crop: tuple[Count, Count, Count] | None = None
    """Voxels of a training crop, and so of an inference window; the task's patch size if not given."""
    foreground: float = Field(default=0.0, ge=0, le=1)
    """Share of crops centred on a labelled voxel. The paper's crops are all uniform: 0."""
    seed: int = 1037
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    precision: Precision = "float32"
    """`bfloat16`: convolutions and matrix products in it, on a GPU that can; weights, sums of norms and losses stay
    float32."""
    compile: bool = False
    """Let torch.compile build the encoders and the separate decoder, which are the same for every subset of
    modalities. Needs a C++ compiler; the first steps take minutes."""
    graphs: bool = True
    """On a GPU, with one process and steps of one subject: record a step of each subset of modalities as a CUDA graph
    and replay it. `compile` goes without."""
    workers: int = Field(default=0, ge=0)
    """Loader processes; 0 loads in the training process, which a GPU waits for. Results do not depend on it."""

    @classmethod
    def read(cls, path: Path, changes: Mapping[str, Any] | None = None) -> TrainConfig:
        """From a YAML file, with `changes` in place of its values. Raises `UserError` naming file and field."""
        try:
            content = yaml.safe_load(path.read_text())
        except OSError as error:
            raise UserError(f"{path}: cannot read the configuration ({error.strerror})") from None
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}: expected `key: value` lines such as `data: prepared`")
        try:
            config = cls.model_validate(content | dict(changes or {}))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(p) for p in first["loc"])
            if first["type"] == "extra_forbidden":
                raise UserError(f"{path}: unknown key {field!r}; known keys: {', '.join(cls.model_fields)}") from None
            raise UserError(f"{path}: {first_problem(error)}") from None
        for problem in config.problems():
            raise UserError(f"{path}: {problem}")
        return config

    def problems(self) -> Iterator[str]:
        """What only values together, or the rest of the package, can tell: a line each, with field and remedy."""
        from models.backbones import BACKBONES  # these bring torch, which `passion --help` does without
        from training.methods import METHODS

        if self.method not in METHODS:
            yield f"method: {self.method!r} is unknown; choose one of {', '.join(METHODS)}"
        entry = BACKBONES.get(self.backbone)
        if entry is None:
            yield f"backbone: {self.backbone!r} is unknown; choose one of {', '.join(BACKBONES)}"
        elif self.crop is not None and not entry.takes(self.crop):
            unit = entry.divisor
            yield f"crop: {self.backbone} needs multiples of {unit}, at least {2 * unit}, not {list(self.crop)}"
        if self.warmup_epochs >= self.epochs:
            yield f"warmup_epochs: {self.warmup_epochs} leaves no epoch of {self.epochs} to train; lower it"
