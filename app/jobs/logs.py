"""Logs: one JSON object per line on stderr, ids and figures only, never names of files, people or header text."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from types import TracebackType

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from app.jobs.queue import TASK
from app.jobs.record import ID
from app.jobs.settings import Settings

SHARED: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


OF_TASK = re.compile(rf"{re.escape(TASK)}\[({ID.pattern})\]")
"""How Celery names a task in its own words; the id of ours is the job's."""


def _job_of_celery(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """Celery's lines about a job are found by its id, as ours are."""
    found = OF_TASK.search(str(event["event"]))
    if found:
        event["job_id"] = found[1]
    return event


def _frames(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """A library's traceback without the exception's words."""
    info = event.pop("exc_info", None)
    error = info if isinstance(info, BaseException) else info[1] if isinstance(info, tuple) else sys.exc_info()[1]
    if info and error is not None:
        event["where"] = where(error)
    return event


def configure(settings: Settings) -> None:
    """Send structlog's and the libraries' own records through one formatter."""
    structlog.configure(
        processors=[*SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.set_name("passion")
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*SHARED, _job_of_celery],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _frames,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    for old in [h for h in root.handlers if h.name == handler.name]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(settings.log_level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "celery", "kombu"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    # Paths carry job ids, which are the only key to a job: one line per request is ours to write, without the query.
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("celery.app.trace").setLevel(logging.WARNING)


def where(error: BaseException) -> list[str]:
    """The frames of an error as `file:line function`, without its message: that may quote a header or a path."""
    frames: list[str] = []
    link: BaseException | None = error
    while link is not None:
        tb: TracebackType | None = link.__traceback__
        frames.append(type(link).__name__)
        frames += [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(tb)]
        link = link.__cause__ or link.__context__
    return frames
