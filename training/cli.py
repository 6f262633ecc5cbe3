"""`passion`: the command line of the training half."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from training.commands.backbones import backbones
from training.commands.evaluate import evaluate
from training.commands.experiment import experiment
from training.commands.export import export
from training.commands.import_ import import_
from training.commands.info import info
from training.commands.phantom import phantom
from training.commands.predict import predict
from training.commands.prepare import prepare
from training.commands.split import split
from training.commands.train import train
from training.errors import UserError

app = typer.Typer(
    name="passion",
    help="Train and use brain tumour segmentation models for MRI with missing scans. "
    "Research software, not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (phantom, prepare, split, train, evaluate, predict, info, experiment, backbones):
    app.command()(command)
app.command("import")(import_)
app.command()(export)


def main() -> None:
    """Run a command; what the user can mend is one line on standard error and exit status 2."""
    try:
        app()
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print("[bold red]error:[/] ", end="")
        print(error, file=sys.stderr)
        sys.exit(2)
