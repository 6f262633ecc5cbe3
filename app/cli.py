"""`passion-server`: start the service, or use one."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.batch_command import segment_batch
from app.client_names import Result
from app.endings import INTERRUPTED, NOT_DONE, REFUSED, give_up, settings_with
from app.key_commands import keys

if TYPE_CHECKING:
    from app.client import Client

cli = typer.Typer(
    name="passion-server",
    help="The segmentation service: start it (up, api, worker), say who may use it (keys), send it images (segment). "
    "Settings come from PASSION_* variables.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cli.add_typer(keys)

Models = Annotated[Path | None, typer.Option(help="Folder of checkpoint folders. [PASSION_MODELS]", show_default=False)]
Store = Annotated[Path | None, typer.Option(help="Folder of the jobs' files. [PASSION_STORE]", show_default=False)]
Host = Annotated[str | None, typer.Option(help="Address to listen on. [PASSION_HOST]", show_default=False)]
Port = Annotated[int | None, typer.Option(help="Port; 0 takes a free one. [PASSION_PORT]", show_default=False)]


@cli.command()
def up(host: Host = None, port: Port = None, models: Models = None, store: Store = None) -> None:
    """Start all of it: Redis if none is set, the API and one worker. One Ctrl-C stops all.

    Prints `PASSION Seg is ready at URL` on standard output when jobs can be sent; logs go to standard error. Without a
    store, jobs are kept until the service stops; with one, files and records outlive it. Beyond loopback it asks for
    API keys (`keys create`); without a store, and so without keys that outlive it, it makes one and prints it too.
    """
    from app.redis_server import NoRedisError
    from app.stack import StackError, run_stack

    settings = settings_with(host=host, port=port, models=models, store=store)
    own_redis = not (os.environ.get("PASSION_REDIS_URL") or os.environ.get("REDIS_URL"))
    keep = not own_redis or store is not None or bool(os.environ.get("PASSION_STORE"))
    try:
        run_stack(settings, keep, own_redis, _announce)
    except (StackError, NoRedisError) as error:
        give_up(str(error))


def _announce(url: str, key: str | None) -> None:
    print(f"PASSION Seg is ready at {url} (its description: {url}/docs). Ctrl-C stops it.", flush=True)
    if key is not None:
        print(f"API key (shown once): {key}", flush=True)


@cli.command()
def api(
    host: Host = None,
    port: Port = None,
    models: Models = None,
    store: Store = None,
    fd: Annotated[int | None, typer.Option(hidden=True, help="A socket that listens already.")] = None,
) -> None:
    """Start the API alone. It needs Redis, and jobs wait until a worker comes."""
    import gc
    import importlib
    import socket

    import uvicorn

    from app.web.server import server_config

    server = uvicorn.Server(server_config(settings_with(host=host, port=port, models=models, store=store)))
    # What is imported stays. Else the collector would look through all of it now and then, and nobody be answered
    # meanwhile for a tenth of a second.
    for name in ("celery", "kombu.transport.redis", "nibabel"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    server.run(sockets=None if fd is None else [socket.socket(fileno=fd)])
    if not server.started:
        raise typer.Exit(NOT_DONE)


@cli.command()
def worker(models: Models = None, store: Store = None) -> None:
    """Start a worker alone. It needs Redis, the store that the API writes to, and the models."""
    from app.stack import worker_command, worker_environment

    settings = settings_with(models=models, store=store)
    command = worker_command()
    sys.stdout.flush()
    # In this process's place: whoever stops this command stops Celery itself.
    os.execve(command[0], command, worker_environment(os.environ | settings.environment()))


@cli.command()
def segment(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option("-o", "--output", help="Where the mask goes, .nii.gz or .nii; with --batch, a folder.")
    ],
    url: Annotated[str, typer.Option(help="Where the service is.", envvar="PASSION_URL")] = "http://127.0.0.1:8000",
    flair: Annotated[Path | None, typer.Option(help="FLAIR volume.", show_default=False)] = None,
    t1ce: Annotated[Path | None, typer.Option(help="Contrast-enhanced T1 volume.", show_default=False)] = None,
    t1: Annotated[Path | None, typer.Option(help="T1 volume.", show_default=False)] = None,
    t2: Annotated[Path | None, typer.Option(help="T2 volume.", show_default=False)] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="A volume of any modality of the model, by name.", show_default=False),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="A patient's folder, instead: its scans are told by their names.", show_default=False),
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(help="A folder of patients' folders: all of them, what is done stays done.", show_default=False),
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, max=64, help="With --batch: patients at the service at a time.")] = 4,
    model: Annotated[str | None, typer.Option(help="Which model; see GET /models.", show_default=False)] = None,
    preprocess: Annotated[
        str | None,
        typer.Option(help="raw: register and strip the scans; none: take them as they are; auto.", show_default=False),
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="Modality on whose grid the mask is to lie.", show_default=False)
    ] = None,
    et_value: Annotated[
        int | None, typer.Option(help="What the mask holds for enhancing tumour: 3 or 4.", show_default=False)
    ] = None,
    priority: Annotated[
        str | None,
        typer.Option(
            help="interactive, or batch, which waits behind the others.  [default: batch with --batch]",
            show_default=False,
        ),
    ] = None,
    save: Annotated[
        list[Result] | None, typer.Option(help="What to write beside the mask; may be repeated.", show_default=False)
    ] = None,
    keep: Annotated[bool, typer.Option(help="Leave the job on the service instead of deleting it.")] = False,
    key_file: Annotated[
        Path | None, typer.Option(help="File with the API key, if it is not in PASSION_KEY.", show_default=False)
    ] = None,
) -> None:
    """Send volumes of one patient to a service and get the mask, on the grid of the first volume given.

    In a folder names are those of BraTS or BIDS, or end in a modality or alias of the model; the first volume is the
    first there is in the model's order. What was taken for what is said; no name of a file is sent. Beside mask.nii.gz,
    --save writes mask-report.json, mask-preview.png and mask-REGION-probability.nii.gz.

    Where the service asks for an API key, it is read from PASSION_KEY or a file: others can read a command line.
    Status 0: the mask, or every one of the batch, is there and whole. 1: it is not, and it may be worth trying again.
    2: the input was refused.
    """
    from app.client import Client, ClientError
    from app.client_results import save as save_results
    from app.progress import JobProgress

    results = list(dict.fromkeys(save or []))
    form = {"model": model, "preprocess": preprocess, "grid": grid, "et_value": et_value, "priority": priority}
    form |= {"probabilities": "true" if Result.PROBABILITIES in results else None}
    words = {field: str(word) for field, word in form.items() if word is not None}

    named = {"flair": flair, "t1ce": t1ce, "t1": t1, "t2": t2}
    images: dict[str, Path] = {}
    for option in context.params:  # in the order of the command line, which decides whose grid the mask has
        if option == "image":
            for text in image or []:
                _add(images, *_named_file(text))
        elif named.get(option) is not None:
            _add(images, option, named[option])
    if batch is not None:
        if images or folder is not None:
            give_up("give --batch, --folder or volumes by name, one of the three", REFUSED)
        segment_batch(batch, out, url, _key(key_file), words, results, at_once, keep)
        return
    _check(images, folder, out)
    images = images if folder is None else _found(folder, url, _key(key_file), model)
    job: dict[str, Any] | None = None
    with (
        Client(url, _key(key_file)) as client,
        JobProgress(sum(path.stat().st_size for path in images.values())) as progress,
    ):
        try:
            job = client.submit(images, words, progress.sent)
            progress.accepted()
            done = client.wait(job, progress.job)
        except ClientError as error:
            progress.stop()
            _forget(client, job)
            give_up(str(error), REFUSED if error.refused else NOT_DONE)
        except KeyboardInterrupt:
            progress.stop()
            _forget(client, job)
            give_up("stopped; the service was told to delete the job", INTERRUPTED)
        try:
            save_results(client, done, out, results)
        except ClientError as error:
            progress.stop()
            give_up(f"{error}; the mask is still at {url.rstrip('/')}{done['links']['mask']}")
        if not keep:
            _forget(client, done)
    _report(done, out)


def _check(images: dict[str, Path], folder: Path | None, out: Path) -> None:
    """Ends the command for what does not go together."""
    if (folder is None) != bool(images):
        few = "give at least one volume, such as --flair flair.nii.gz or --image NAME=FILE, or a --folder"
        give_up("give --folder or volumes by name, not both" if images else few, REFUSED)
    if not out.name.endswith((".nii", ".nii.gz")):
        give_up(f"{out}: the mask's name must end in .nii.gz or .nii", REFUSED)
    if not out.parent.is_dir():
        give_up(f"{out.parent} is no folder: make it first", REFUSED)


def _key(file: Path | None) -> str | None:
    """The API key, if there is one."""
    try:
        text = os.environ.get("PASSION_KEY", "") if file is None else file.read_text()
    except (OSError, UnicodeDecodeError):
        give_up(f"{file}: cannot read the API key", REFUSED)
    if not text.strip().isascii() or len(text.split()) > 1:
        give_up("the API key must be one word, as `passion-server keys create` printed it", REFUSED)
    return text.strip() or None


def _forget(client: Client, job: dict[str, Any] | None) -> None:
    """Leave no scans behind on the service. If it is away there is nothing more to do."""
    from app.client import ClientError

    if job is not None:
        with suppress(ClientError):
            client.delete(job)


def _named_file(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        give_up(f"--image {text}: write NAME=FILE, such as flair=flair.nii.gz", REFUSED)
    return name, Path(file)


def _add(images: dict[str, Path], name: str, path: Path | None) -> None:
    assert path is not None
    if name in images:
        give_up(f"{name} is given twice", REFUSED)
    if not path.is_file():
        give_up(f"{path}: no such file", REFUSED)
    images[name] = path


def _found(folder: Path, url: str, key: str | None, model: str | None) -> dict[str, Path]:
    """The scans in a patient's folder, by modality of the service's model; says what it took."""
    from app.client import Client, ClientError
    from app.names import FileNames, FolderError

    try:
        with Client(url, key) as client:
            names = FileNames(client.modalities(model))
        scans = names.find(folder)
    except ClientError as error:
        give_up(str(error), REFUSED if error.refused else NOT_DONE)
    except FolderError as error:
        give_up(str(error), REFUSED)
    for line in (*scans.said, *scans.warnings):
        print(line, file=sys.stderr)
    return scans.files


def _report(job: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    volumes, expected = job["volumes_ml"], (job["expected_dice"] or {})
    table = Table("region", "volume, mL", "expected Dice")
    for region, volume in volumes.items():
        dice = expected.get("dice", {}).get(region)
        table.add_row(region, f"{volume:.2f}", "not measured" if dice is None else f"{dice:.3f}")
    console.print(table)
    if not any(volumes.values()):
        console.print("[bold]The mask is empty: the model found nothing.[/bold]")
    if expected:
        given = ", ".join(job["modalities"]["given"])
        console.print(
            f"Expected Dice: the model's own, on {expected['cases']} cases of {expected['dataset']} with {given}."
        )
    console.print(f"Mask: {out}")
    console.print(job["notice"], style="dim")


def main() -> None:
    """The console script."""
    cli()


if __name__ == "__main__":
    main()
