"""`passion predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from training.commands.windows import Window, window_size
from training.errors import UserError

GIVEN = "passion.given"
"""Where the context keeps the scans in the order of the command line, in which click calls the callbacks."""


def _remember(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> Any:
    given: dict[str, Path] = context.meta.setdefault(GIVEN, {})
    if isinstance(value, list):
        for item in value:
            name, found, file = item.partition("=")
            if not found or not file:
                raise UserError(f"--image {item}: write NAME=FILE, such as --image t1c=scan.nii.gz")
            if name in given:
                raise UserError(f"{name} is given twice")
            given[name] = Path(file)
    elif value is not None:
        given[str(parameter.name)] = value
    return value


Scan = Annotated[
    Path | None, typer.Option(help="A NIfTI scan of this modality.", show_default=False, callback=_remember)
]


def predict(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The mask to write, .nii.gz or .nii.")],
    flair: Scan = None,
    t1ce: Scan = None,
    t1: Scan = None,
    t2: Scan = None,
    image: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE, for any modality of any model; may be repeated.", callback=_remember),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    overlap: Annotated[
        float | None,
        typer.Option(help="Share of a window that the next one covers again.  [default: 0.5]", show_default=False),
    ] = None,
    window: Window = None,
    precision: Annotated[
        str, typer.Option(help="Of the encoders: float32, or bfloat16 for a GPU that has it.")
    ] = "float32",
    fast: Annotated[
        bool, typer.Option("--fast", help="Fewer windows (--overlap 0.25) in half of the time, less accurate.")
    ] = False,
    preprocess: Annotated[
        str | None,
        typer.Option(
            help="raw: register the scans and strip the skull; none: take them as they are; auto: raw for those that "
            "need it.  [default: auto]",
            show_default=False,
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Scans as they come from the scanner: --preprocess raw.")] = False,
    grid: Annotated[
        str | None,
        typer.Option(help="Modality on whose grid the mask is to lie.  [default: the first given]", show_default=False),
    ] = None,
) -> None:
    """Segment one patient from whatever scans there are; the mask lies on the grid of the first one given.

    Exit status 0 means the mask is there and whole.
    """
    from models.checkpoint import Checkpoint, CheckpointError
    from models.predictor import FAST_OVERLAP, OVERLAP, OptionError, Predictor
    from models.raw.prepare import AUTO, RAW
    from models.task import TaskError
    from models.volume import VolumeError
    from training.device import choose_device

    files: dict[str, Path] = context.meta.get(GIVEN, {})
    if not files:
        raise UserError("no scan given: name at least one, such as --flair scan.nii.gz")
    if not output.name.endswith((".nii", ".nii.gz")):
        raise UserError(f"{output}: end the mask's name in .nii.gz or .nii")
    if not output.parent.is_dir():
        raise UserError(f"{output.parent} is no folder: make it first")
    if fast and overlap is not None:
        raise UserError(f"--fast is --overlap {FAST_OVERLAP:g}: give one of the two")
    share = FAST_OVERLAP if fast else OVERLAP if overlap is None else overlap
    if raw and preprocess not in {None, RAW}:
        raise UserError(f"--raw is --preprocess {RAW}: give one of the two")
    mode = RAW if raw else preprocess or AUTO
    size = window_size(window)
    console = Console(stderr=True)
    try:
        predictor = Predictor(
            Checkpoint.load(checkpoint), choose_device(device), overlap=share, window=size, precision=precision
        )
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("loading", total=1.0)
            result = predictor.segment(
                files,
                lambda stage, fraction: progress.update(bar, description=stage, completed=fraction),
                preprocess=mode,
                grid=grid,
            )
        result.save(output)
    except (CheckpointError, OptionError, TaskError, VolumeError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{output}: cannot write the mask ({error.strerror})") from error
    volumes = ", ".join(f"{name} {ml:.2f} mL" for name, ml in result.volumes_ml.items())
    print(f"{output}: {volumes} (research software, not a medical device)")
    for warning in result.warnings:
        console.print(f"[bold yellow]warning:[/] {escape(warning)}")
    if result.empty:
        console.print("[bold yellow]the mask is empty:[/] the model found nothing in these scans")
