"""`Bucket`: objects below a prefix of an S3-compatible store, by their keys there."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import structlog

T = TypeVar("T")

log = structlog.get_logger("app.jobs")

PART = 16 << 20
"""Bytes of one part of an object that is sent in parts, which it is from twice as much on."""
MOST_AT_ONCE = 1000
"""Objects that S3 removes by one request."""
FULL = {errno.ENOSPC, errno.EDQUOT}


class StoreAwayError(Exception):
    """The store does not answer, or refuses. Holds no text of the store's, which may name keys."""

    def __init__(self) -> None:
        super().__init__("the store does not answer as it should")


class Bucket:
    """By s3fs. Where the store is and who we are it reads as all of AWS's tools do (`AWS_ENDPOINT_URL`,
    `AWS_ACCESS_KEY_ID` and so on, or the machine's role).

    Methods raise `StoreAwayError`, and `OSError` for what is wrong with a local file.
    """

    def __init__(self, url: str, pauses: Sequence[float] = (), part: int = PART) -> None:
        """`url`: s3://bucket/prefix. `pauses`: seconds before each further attempt when the store is away."""
        self._root = url.removeprefix("s3://").strip("/")
        self._pauses = tuple(pauses)
        self._part = part
        self._made: Any = None

    @property
    def _fs(self) -> Any:
        if self._made is None:
            import s3fs  # a second, and only where there is a bucket

            for name in ("botocore", "aiobotocore"):  # which tell where they found what
                logging.getLogger(name).setLevel(logging.WARNING)
            self._made = s3fs.S3FileSystem(
                skip_instance_cache=True,  # nothing is shared with the process that this one was forked from
                use_listings_cache=False,  # others write, too
                config_kwargs={"connect_timeout": 3, "read_timeout": 30, "retries": {"max_attempts": 1}},
            )
        return self._made

    def ping(self) -> None:
        """Return if the bucket answers."""
        name = self._root.partition("/")[0]
        self._attempt(lambda: self._fs.call_s3("list_objects_v2", Bucket=name, MaxKeys=1), once=True)

    def put(self, path: Path, key: str) -> None:
        """Send a file: whole, or not at all."""
        path.stat()
        self._attempt(lambda: self._fs.put_file(str(path), self._at(key), chunksize=self._part))

    def get(self, key: str, path: Path) -> None:
        """Fetch an object into a file: whole, or not at all. Raises `FileNotFoundError`."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            self._attempt(lambda: self._fs.get_file(self._at(key), str(temporary)), missing=True)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        return bool(self._attempt(lambda: self._fs.isfile(self._at(key))))

    def objects(self, below: str = "") -> dict[str, float]:
        """Keys below a key, each with the time (seconds since 1970) at which it was written last."""
        found = self._attempt(lambda: self._fs.find(self._at(below) if below else self._root, detail=True))
        start = len(self._root) + 1
        return {name[start:]: entry["LastModified"].timestamp() for name, entry in cast(Any, found).items()}

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; quiet about those that there are not."""
        name, _, prefix = self._root.partition("/")
        objects = [{"Key": f"{prefix}/{key}".lstrip("/")} for key in keys]
        for start in range(0, len(objects), MOST_AT_ONCE):
            few = {"Objects": objects[start : start + MOST_AT_ONCE], "Quiet": True}
            self._attempt(partial(self._fs.call_s3, "delete_objects", Bucket=name, Delete=few))

    def link(self, key: str, seconds: int, media_type: str, name: str | None) -> str:
        """An address at the store from which anybody may fetch an object for some time, to be saved under `name`."""
        said = f'attachment; filename="{name}"' if name else "inline"
        answer = {"ResponseContentDisposition": said, "ResponseContentType": media_type}
        return str(self._attempt(lambda: self._fs.url(self._at(key), expires=seconds, **answer), once=True))

    def abort_parts(self, older_than: float, ours: Callable[[str], bool]) -> None:
        """End what was begun to be sent in parts more than so many seconds ago, and never ended, of the keys that are
        `ours`: its parts are kept, and nobody sees them."""
        name, _, prefix = self._root.partition("/")
        limit = datetime.fromtimestamp(time.time(), UTC) - timedelta(seconds=older_than)
        answer = self._attempt(lambda: self._fs.call_s3("list_multipart_uploads", Bucket=name, Prefix=prefix))
        start = len(prefix) + 1 if prefix else 0
        for upload in cast(Any, answer).get("Uploads", []):
            if upload["Initiated"] >= limit or not ours(upload["Key"][start:]):
                continue
            ended = {"Bucket": name, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            self._attempt(partial(self._fs.call_s3, "abort_multipart_upload", **ended))

    def _at(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _attempt(self, action: Callable[[], T], once: bool = False, missing: bool = False) -> T:
        """`missing`: whether it is an answer that an object is not there."""
        for pause in (*(() if once else self._pauses), None):
            try:
                return action()
            except Exception as error:  # s3fs, botocore and aiohttp each have their own, without a common one
                if isinstance(error, FileNotFoundError) and missing:
                    raise
                if isinstance(error, OSError) and error.errno in FULL:
                    raise
                if pause is None:
                    log.warning("the store is away", kind=type(error).__name__)
                    raise StoreAwayError from None  # what botocore says may name keys
                time.sleep(pause)
        raise AssertionError
