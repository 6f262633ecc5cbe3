"""`passion train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from training.config import TrainConfig

if TYPE_CHECKING:
    from training.ranks import Ranks


def train(
    config: Annotated[Path, typer.Argument(help="The run's configuration, a YAML file.")],
    resume: Annotated[bool, typer.Option(help="Continue the run in `out` exactly where it stopped.")] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="How many epochs.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder.")] = None,
    data: Annotated[Path | None, typer.Option(help="The prepared data set.")] = None,
    split: Annotated[Path | None, typer.Option(help="The split.")] = None,
    backbone: Annotated[str | None, typer.Option(help="A backbone of `passion backbones`.")] = None,
    regime: Annotated[str | None, typer.Option(help="idt, idt_drop or pdt.")] = None,
    method: Annotated[str | None, typer.Option(help="passion, none, or another one (docs/method.md).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initialisation, order, crops and augmentation.")] = None,
    warmup_epochs: Annotated[int | None, typer.Option(min=0, help="Epochs with the separate paths only.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
) -> None:
    """Train a model on a prepared data set. SIGTERM and Ctrl-C save and stop; --resume continues.

    On several GPUs: `torchrun --nproc-per-node 2 -m training train run.yaml`. An option takes the place of the
    configuration's value of that name.
    """
    from training.ranks import join

    changes = {
        "epochs": epochs,
        "out": out,
        "data": data,
        "split": split,
        "backbone": backbone,
        "regime": regime,
        "method": method,
        "seed": seed,
        "warmup_epochs": warmup_epochs,
        "device": device,
    }
    with join() as ranks:
        _train(TrainConfig.read(config, {k: v for k, v in changes.items() if v is not None}), resume, ranks)


def _train(settings: TrainConfig, resume: bool, ranks: Ranks) -> None:
    from training.trainer import StepReport, Trainer

    trainer = Trainer(settings, resume=resume, ranks=ranks)
    console = Console(quiet=not ranks.main)
    device = f"{ranks.world} x {trainer.device.type}" if ranks.world > 1 else str(trainer.device)
    console.print(
        f"{len(trainer.subjects.cases)} subjects, {settings.epochs} epochs of {trainer.steps} steps, "
        f"crop {'x'.join(map(str, trainer.task.patch_size))}, {device}, "
        f"regime {settings.regime}, method {settings.method}"
    )
    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    with Progress(*columns, console=console) as progress:
        total = settings.epochs * trainer.steps
        bar = progress.add_task("", total=total, epoch=trainer.state.epoch, losses="")

        def show(report: StepReport) -> None:
            parts = " ".join(f"{name} {value:.3f}" for name, value in report.means.items())
            progress.update(
                bar,
                completed=report.epoch * report.steps + report.step,
                epoch=report.epoch,
                losses=parts,
            )

        def tell(record: dict[str, Any]) -> None:
            if ranks.main and not console.is_terminal:  # a log has no progress bar: a line per epoch instead
                loss = " ".join(f"{name} {value:.3f}" for name, value in record["loss"].items())
                print(f"epoch {record['epoch']}: {loss} ({record['seconds']:.0f} s)", flush=True)

        finished = trainer.run(show, tell)
    if finished:
        console.print(f"done: {trainer.folder}", soft_wrap=True)
    else:
        console.print(
            f"stopped and saved in epoch {trainer.state.epoch}, step {trainer.state.step}: {trainer.folder}; "
            "continue with --resume",
            soft_wrap=True,
        )
