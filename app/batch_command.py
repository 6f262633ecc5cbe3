"""`passion-server segment --batch`: many patients through a service."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

import typer

from app.client_names import Result
from app.endings import INTERRUPTED, NOT_DONE, REFUSED, give_up


def segment_batch(
    root: Path,
    out: Path,
    url: str,
    key: str | None,
    form: dict[str, str],
    results: list[Result],
    at_once: int,
    keep: bool,
) -> None:
    """Take the patients in `root` through the service; masks and report go into `out`. Ends the command, with status 1
    if not every mask is there."""
    from app.client import Client, ClientError
    from app.client_batch import REPORT, TABLE, Batch, BatchError, Report, find_patients, form_of_batch
    from app.names import FileNames

    if out.name.endswith((".nii", ".nii.gz")) or out.is_file():
        give_up(f"{out}: with --batch, -o is the folder for the masks", REFUSED)
    try:
        patients = find_patients(root)
        with Client(url, key) as client:
            names = FileNames(client.modalities(form.get("model")))
            form = form_of_batch(form, client.fields())
    except BatchError as error:
        give_up(str(error), REFUSED)
    except ClientError as error:
        give_up(str(error), REFUSED if error.refused else NOT_DONE)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with Batch.opened(out, Report(url=url, form=form, save=results), names, _say) as batch:
            rows = batch.run(patients, url, key, at_once, keep)
    except BatchError as error:
        give_up(str(error), NOT_DONE)
    except KeyboardInterrupt:
        give_up("stopped; what was sent goes on at the service, and the same command takes it up", INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)
    failed = [row for row in rows if row.state != "done"]
    print(f"{len(rows) - len(failed)} of {len(rows)} patients done: {out / REPORT}, {out / TABLE}")
    if failed:
        raise typer.Exit(NOT_DONE)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")  # in one piece, for there are several threads


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
