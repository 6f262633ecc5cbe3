"""`passion predict`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from training.commands.dicom import SegFile, check_seg_path
from training.commands.windows import Window, window_size
from training.errors import UserError

if TYPE_CHECKING:
    from models.predictor import Segmentation
    from models.task import Task
    from training.batch import OnProgress, Segment

ET, ET_VALUE = "ET", 3
"""The region of enhancing tumour, and what files of BraTS hold for it since 2023; before, they held 4."""

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
    Path | None,
    typer.Option(
        help="A scan of this modality: NIfTI, or a folder or zip of one DICOM series.",
        show_default=False,
        callback=_remember,
    ),
]


def predict(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The mask to write, .nii.gz or .nii; with --batch, a folder.")
    ],
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="A patient's folder, whose scans are told by their names; with --batch, a folder of such folders.",
            show_default=False,
        ),
    ] = None,
    flair: Scan = None,
    t1ce: Scan = None,
    t1: Scan = None,
    t2: Scan = None,
    image: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE, for any modality of any model; may be repeated.", callback=_remember),
    ] = None,
    batch: Annotated[
        bool,
        typer.Option("--batch", help="Segment every patient in FOLDER into the folder -o; what is done stays done."),
    ] = False,
    et_value: Annotated[
        int | None,
        typer.Option(
            help="What masks hold for enhancing tumour: 3 as BraTS since 2023 (default), or 4 as before.",
            show_default=False,
        ),
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
    dicom_seg: Annotated[
        Path | None,
        typer.Option(
            help="Also write the mask as DICOM SEG, .dcm, if the scan on whose grid it lies is a DICOM series.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Segment a patient from whatever scans there are; the mask lies on the grid of the first one given.

    Of a FOLDER, that is the first there is in the model's order. Names are those of BraTS (ID_flair.nii.gz or
    ID-t2f.nii.gz), of BIDS (sub-01_FLAIR.nii.gz, sub-01_ce-gd_T1w.nii.gz, also in anat/), or end in a modality.

    Exit status 0 means the mask is there and whole; with --batch, every mask. 1: a patient of the batch failed.
    """
    from models.checkpoint import Checkpoint, CheckpointError, load_card
    from models.names import FolderError
    from models.predictor import OptionError, Predictor
    from models.task import TaskError
    from models.volume import VolumeError
    from training.device import choose_device

    files: dict[str, Path] = context.meta.get(GIVEN, {})
    _check(files, folder, output, batch, dicom_seg)
    share, mode, size = _share(fast, overlap), _mode(raw, preprocess), window_size(window)
    console = Console(stderr=True)
    try:
        card = load_card(checkpoint)
        values = label_values(card.task, et_value)

        def load() -> Segment:
            predictor = Predictor(
                Checkpoint.load(checkpoint), choose_device(device), overlap=share, window=size, precision=precision
            )

            def segment(files: Mapping[str, Path], on_progress: OnProgress) -> Segmentation:
                found = predictor.segment(files, on_progress, preprocess=mode, grid=grid)
                return found.writing(values)

            return segment

        if batch:
            from training.commands.batch import predict_batch

            assert folder is not None
            written = card.model_copy(update={"task": card.task.writing(values)})
            settings = {"overlap": share, "window": size and list(size), "precision": precision}
            settings |= {"preprocess": mode, "grid": grid}
            predict_batch(folder, output, written, settings, load)
            return
        if folder is not None:
            scans = card.task.file_names.find(folder)
            for line in (*scans.said, *scans.warnings):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            files = scans.files
        same = next((name for name, file in files.items() if file.resolve() == output.resolve()), None)
        if same is not None:
            raise UserError(f"{output} is the scan of {same}: give the mask another name")
        seg_file = SegFile.planned(dicom_seg, files, card.task, grid)
        segment = load()
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("loading", total=1.0)
            result = segment(files, lambda stage, fraction: progress.update(bar, description=stage, completed=fraction))
        result.save(output)
        no_seg = seg_file.save(result, card) if seg_file else ()
    except (CheckpointError, FolderError, OptionError, TaskError, VolumeError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{output}: cannot write the mask ({error.strerror})") from error
    volumes = ", ".join(f"{name} {ml:.2f} mL" for name, ml in result.volumes_ml.items())
    held = "".join(f"; {name} is {value}" for name, value in values.items())
    print(f"{output}: {volumes}{held} (research software, not a medical device)")
    for warning in (*result.warnings, *no_seg):
        console.print(f"[bold yellow]warning:[/] {escape(warning)}")
    if result.empty:
        console.print("[bold yellow]the mask is empty:[/] the model found nothing in these scans")


def label_values(task: Task, et_value: int | None) -> dict[str, int]:
    """What files are to hold for which label of a task, by name: that of enhancing tumour, if it is read under several.

    `et_value`: None for the default. Raises `UserError` if it was given for a task without enhancing tumour.
    """
    places = next((region.labels for region in task.regions if region.name == ET), ())
    label = task.labels[places[0]] if len(places) == 1 else None
    if et_value is not None:
        if label is None:
            raise UserError(f"--et-value {et_value}: task {task.name} has no region {ET} of one label")
        if et_value not in (label.value, *label.also_read):
            known = " or ".join(map(str, sorted((label.value, *label.also_read))))
            raise UserError(f"--et-value {et_value}: task {task.name} knows {label.name} as {known}")
        return {label.name: et_value}
    return {label.name: ET_VALUE} if label is not None and ET_VALUE in (label.value, *label.also_read) else {}


def _share(fast: bool, overlap: float | None) -> float:
    from models.predictor import FAST_OVERLAP, OVERLAP

    if fast and overlap is not None:
        raise UserError(f"--fast is --overlap {FAST_OVERLAP:g}: give one of the two")
    return FAST_OVERLAP if fast else OVERLAP if overlap is None else overlap


def _mode(raw: bool, preprocess: str | None) -> str:
    from models.raw.prepare import AUTO, RAW

    if raw and preprocess not in {None, RAW}:
        raise UserError(f"--raw is --preprocess {RAW}: give one of the two")
    return RAW if raw else preprocess or AUTO


def _check(files: dict[str, Path], folder: Path | None, output: Path, batch: bool, dicom_seg: Path | None) -> None:
    """Raises `UserError` for what does not go together."""
    check_seg_path(dicom_seg, batch)
    if folder is not None and files:
        raise UserError(f"{folder} and --{next(iter(files))}: give a folder or scans, not both")
    if batch and folder is None:
        raise UserError("--batch: give a folder with one folder for each patient")
    if batch:
        if output.exists() and not output.is_dir():
            raise UserError(f"{output}: is a file; with --batch, -o is the folder for the masks")
        if output.name.endswith((".nii", ".nii.gz")):
            raise UserError(f"{output}: with --batch, -o is the folder for the masks")
        return
    if folder is None and not files:
        raise UserError("no scan given: name at least one, such as --flair scan.nii.gz, or a patient's folder")
    if not output.name.endswith((".nii", ".nii.gz")):
        raise UserError(f"{output}: end the mask's name in .nii.gz or .nii")
    if not output.parent.is_dir():
        raise UserError(f"{output.parent} is no folder: make it first")
