"""A zip that somebody sent: its files, one after another, none of them ever written under the name it has there."""

from __future__ import annotations

import errno
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from app.jobs.scan_header import ScanError, check_spacing, check_voxels
from app.jobs.series import ONE_SERIES, Instance, Series, SeriesError, is_junk
from app.jobs.settings import Settings

ZIP = b"PK"
HEAD = 8 << 20
"""Bytes of a file that are looked at. The header of a volume in one file has some megabytes."""
HEADERS = 128 << 20
"""Bytes of all headers together: a header that is made for it takes a second per some megabytes to read."""
CHUNK = 1 << 20
ENTRY = 1024
"""Bytes per file that a zip's list of files may have."""
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError)
READABLE = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
ZIP_AGAIN = "Zip the folder of the series again, without a password."


def is_zip(head: bytes) -> bool:
    """By a file's first bytes, at least 4."""
    return head[:2] == ZIP and head[2:4] in {b"\3\4", b"\5\6", b"\7\10"}


def check_archive(sent: Path, limits: Settings) -> Series:
    """Read a zip once, to its last byte, and the headers of what it holds. In memory are 8 MiB of it at a time.

    Raises `ScanError` with the reason, and `OSError` as the file system does.
    """
    try:
        with sent.open("rb") as file:
            found, header_bytes = [], 0
            for head in _heads(cast(BinaryIO, _Bounded(file, limits.max_archive_files)), limits):
                instance = Instance.parse(head)
                if instance is None:
                    continue
                found.append(instance)
                header_bytes += instance.header_bytes
                if header_bytes > HEADERS:
                    raise ScanError("bad-header", f"the headers have more than {HEADERS} bytes", ONE_SERIES)
            series = Series.of(found)
    except SeriesError as error:
        raise ScanError(error.kind, error.detail, error.remedy) from None
    except DAMAGED as error:
        raise ScanError("corrupt-zip", "the zip is damaged", ZIP_AGAIN) from error
    check_voxels(series.shape, limits)
    check_spacing(series.affine, limits)
    return series


def _heads(file: BinaryIO, limits: Settings) -> Iterator[bytes]:
    """The first bytes of each file. Each is read through, so that its check sum is looked at."""
    with zipfile.ZipFile(file) as archive:
        members = [m for m in archive.infolist() if not (is_junk(m.filename) or m.is_dir())]
        if len(members) > limits.max_archive_files:
            raise _too_many(limits)
        for member in members:
            if member.flag_bits & 1:
                raise ScanError("corrupt-zip", "the zip is encrypted", ZIP_AGAIN)
            if member.compress_type not in READABLE:
                raise ScanError("corrupt-zip", "the zip is packed by a method that is not read", ZIP_AGAIN)
        left = limits.max_uncompressed_bytes
        if sum(m.file_size for m in members) > left:
            raise _too_large(limits)
        for member in members:
            with archive.open(member) as stream:
                head = bytearray()
                while chunk := stream.read(CHUNK):
                    left -= len(chunk)
                    if left < 0:  # whatever it has said
                        raise _too_large(limits)
                    if len(head) < HEAD:
                        head += chunk
            if is_zip(bytes(head[:4])):
                raise ScanError("corrupt-zip", "the zip holds another zip", "Send one zip of one series' DICOM files.")
            yield bytes(head)


class _Bounded:
    """A file of which no more is read at a time than the list of so many files takes: `zipfile` reads that list as a
    whole, however long a zip says that it is."""

    def __init__(self, file: BinaryIO, files: int) -> None:
        self._file = file
        self._most = max(2 * CHUNK, files * ENTRY)
        self.tell, self.seekable, self.close = file.tell, file.seekable, file.close

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except OSError as error:
            if error.errno == errno.EINVAL and whence == os.SEEK_SET:  # from the end, `zipfile` expects it
                raise zipfile.BadZipFile("a file before the beginning") from None
            raise

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._most + 1 if size < 0 else min(size, self._most + 1))
        if len(data) > self._most:
            raise zipfile.BadZipFile("too long a list of files")
        return data


def _too_many(limits: Settings) -> ScanError:
    return ScanError(
        "too-many-files",
        f"the zip holds more than {limits.max_archive_files} files",
        "Send one series, or ask the operator to raise PASSION_MAX_ARCHIVE_FILES.",
    )


def _too_large(limits: Settings) -> ScanError:
    return ScanError(
        "too-large-uncompressed",
        f"the zip unpacks to more than {limits.max_uncompressed_bytes} bytes",
        "Send one series, or ask the operator to raise PASSION_MAX_UNCOMPRESSED_BYTES.",
    )
