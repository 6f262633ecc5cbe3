"""Damaged NIfTI files by the thousand, and what the service's intake makes of each.

    python benchmarks/fuzz_intake.py --files 20000 --seed 0

Each file is a small valid one (NIfTI-1 or -2, both byte orders, several types, with and without extensions), damaged in
its header, its bytes or its gzip stream; number and seed decide how. The intake must turn it away with a `ScanError` or
write a clean copy, in bounded time, and leave nothing else in the folder. A clean copy must be its own clean copy, show
what nibabel sees in the file that was sent, and be read or turned away by the worker's loader. Every 40th also goes
through HTTP and must not get a 5xx. Ends with status 1, and the numbers of the files, if any of this is not so.
"""

from __future__ import annotations

import argparse
import gzip
import io
import random
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import redis
import uvicorn
from isal import igzip

from app.jobs.connection import connect
from app.jobs.scan import GZIP, check
from app.jobs.scan_header import ScanError
from app.jobs.settings import Settings
from app.redis_server import RedisServer
from app.stack import listen
from app.web.application import create_asgi
from models.volume import Volume, VolumeError

CLEAN, NOT_LOADED = "clean copy", "clean copy that the worker turns away"
LIMITS = {"max_uncompressed_bytes": 1 << 16, "max_voxels": 1 << 14}
SECONDS = 2.0
"""Any file's; on a machine that others use, too."""
EVERY = 40
MEMORY = Path("/dev/shm")
"""On a disk, making and removing the files would take more time than the intake."""
SHAPE = (6, 5, 4)
INTEGERS = [
    *(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 32, 64, 127, 128, 255, 256, 344, 348, 352, 353, 540, 544, 1000, 27307),
    *(2**k + d for k in (15, 16, 31, 32, 63, 64) for d in (-1, 0)),
]
FLOATS = [
    *(0.0, -0.0, 0.5, 1.0, 2.0, 3.0, 29.0, 348.0, 352.0, 352.5, 368.0, 1e-45, 1e-10, 1e5, 1e9, 1e38, 3.5e38, 1e300),
    *(float("nan"), float("inf")),
]
Change = Callable[[bytearray, random.Random], None]


@cache
def seeds() -> tuple[bytes, ...]:
    """Valid files, not compressed."""
    voxels = np.random.default_rng(0).normal(500, 100, SHAPE) * (np.indices(SHAPE).sum(0) > 4)
    affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.1) @ np.diag([1, 1, 3]), [10, -20, 30])
    files = []
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        for type_name, order in (("i2", "<"), ("f4", ">"), ("u1", "<"), ("f8", "<"), ("i2", ">"), ("f4", "<")):
            header = kind.header_class(endianness=order)
            header.set_data_dtype(np.dtype(type_name))
            image = kind((voxels / 4).astype(type_name), affine, header)
            image.set_sform(affine, 1 if type_name != "i2" else 0)
            image.set_qform(affine, 1)
            if type_name != "u1":
                image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe " * 9))
            files.append(image.to_bytes())
    return tuple(files)


def damaged(seed: int, number: int) -> bytes:
    """The file of this number."""
    chance = random.Random(f"{seed}-{number}")
    data = bytearray(chance.choice(seeds()))
    compressed = chance.random() < 0.6
    if not compressed or chance.random() < 0.75:
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            chance.choices((field, header_byte, *ANYWHERE), (6, 2, 1, 1, 1, 1, 1))[0](data, chance)
    if compressed:
        data = bytearray(gzip.compress(bytes(data), chance.choice((0, 1, 6)), mtime=0) * chance.choice((1, 1, 1, 2)))
        if chance.random() < 0.3:
            chance.choice(ANYWHERE)(data, chance)
    return bytes(data)


def field(data: bytearray, chance: random.Random) -> None:
    """One number of the header becomes an unusual one."""
    header = nib.Nifti1Header if len(data) < 540 or data[344:347] == b"n+1" else nib.Nifti2Header
    order = ">" if data[:2] == b"\0\0" else "<"
    dtype, start = chance.choice([(d, at) for d, at in header.template_dtype.fields.values()])
    base, count = (dtype.subdtype[0], int(np.prod(dtype.subdtype[1]))) if dtype.subdtype else (dtype, 1)
    start += chance.randrange(count) * base.itemsize
    if base.kind == "f":
        value = chance.choice(FLOATS) * chance.choice((1, 1, -1))
        with np.errstate(over="ignore"):
            packed = np.array(value).astype(base.newbyteorder(order)).tobytes()
    elif base.kind in "iu":
        value = chance.choice(INTEGERS) * chance.choice((1, 1, -1)) % 256**base.itemsize
        packed = value.to_bytes(base.itemsize, "little" if order == "<" else "big")
    else:
        packed = chance.randbytes(base.itemsize)
    data[start : start + len(packed)] = packed


def header_byte(data: bytearray, chance: random.Random) -> None:
    """A few bytes of the header or of the first extension become any others."""
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(min(len(data), 560))] = chance.randrange(256)


def flip(data: bytearray, chance: random.Random) -> None:
    """A few bits flip."""
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def cut(data: bytearray, chance: random.Random) -> None:
    """The end is missing."""
    del data[chance.randrange(1, len(data)) :]


def insert(data: bytearray, chance: random.Random) -> None:
    """Bytes stand where none did."""
    at = chance.randrange(len(data))
    data[at:at] = chance.choice((chance.randbytes(chance.randint(1, 64)), bytes(chance.choice((1, 16, 100_000)))))


def repeat(data: bytearray, chance: random.Random) -> None:
    """A piece is there twice."""
    start = chance.randrange(len(data))
    piece = data[start : start + chance.randint(1, 600)]
    at = chance.randrange(len(data))
    data[at:at] = piece


def swap(data: bytearray, chance: random.Random) -> None:
    """A word is overwritten by an unusual one, wherever it stands."""
    at = chance.randrange(len(data))
    value = chance.choice(INTEGERS) % 2**32
    data[at : at + 4] = struct.pack(chance.choice("<>") + "I", value)


ANYWHERE: tuple[Change, ...] = (flip, cut, insert, repeat, swap)


class IntakeError(AssertionError):
    """The intake did what it must not do."""


def tried(data: bytes, folder: Path, limits: Settings) -> str:
    """What becomes of a file: a kind of `ScanError`, `CLEAN` or `NOT_LOADED`. Raises `IntakeError`, or what it met."""
    sent, clean, again = folder / "part-0", folder / "flair.nii.gz", folder / "again.nii.gz"
    sent.write_bytes(data)
    began = time.perf_counter()
    try:
        check(sent, clean, limits)
    except ScanError as error:
        result = error.kind
    else:
        result = CLEAN
    if time.perf_counter() - began > SECONDS:
        raise IntakeError(f"took {time.perf_counter() - began:.1f} s")
    left = {path.name for path in folder.iterdir()}
    if left != ({sent.name, clean.name} if result == CLEAN else {sent.name}):
        raise IntakeError(f"left {left}")
    if result == CLEAN:
        check(clean, again, limits)
        if clean.read_bytes() != again.read_bytes():
            raise IntakeError("the clean copy of the clean copy is another")
        try:
            volume = Volume.load(clean)
        except VolumeError:
            result = NOT_LOADED
        else:
            _compare(data, volume)
        again.unlink()
        clean.unlink()
    return result


def _compare(data: bytes, volume: Volume) -> None:
    """The clean copy must show what nibabel sees in the file itself, where it sees anything."""
    plain = igzip.decompress(data) if data[:2] == GZIP else data
    kind = nib.Nifti1Image if plain[344:347] == b"n+1" else nib.Nifti2Image
    try:
        with warnings.catch_warnings(action="ignore"), nib.imageglobals.LoggingOutputSuppressor():
            image = kind.from_bytes(plain)
            voxels = np.asarray(image.dataobj, np.float32).reshape(image.shape[:3])
    except Exception:  # nibabel also reads what the intake passes over: extensions, trailing bytes
        return
    if not (np.array_equal(voxels, volume.data) and np.array_equal(image.affine, volume.grid.affine)):
        raise IntakeError("the clean copy shows another image")


def sent(client: httpx.Client, data: bytes) -> str:
    """How the API answers: its status. Raises `IntakeError` for 5xx."""
    response = client.post("/segment", files={"flair": ("upload", data)})
    if response.status_code >= 500:
        raise IntakeError(f"answered {response.status_code}: {response.text}")
    if response.status_code == 202:
        client.delete(response.headers["location"])
    return f"HTTP {response.status_code}"


def survey(numbers: Sequence[int], seed: int, client: httpx.Client | None) -> tuple[Counter[str], list[str], float]:
    """How often what happened; what must not have; the slowest file's seconds."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="passion-fuzz-", dir=MEMORY if MEMORY.is_dir() else None) as name:
        folder, limits = Path(name), Settings(**LIMITS)
        for number in numbers:
            data = damaged(seed, number)
            began = time.perf_counter()
            try:
                counts[tried(data, folder, limits)] += 1
                slowest = max(slowest, time.perf_counter() - began)
                if client is not None and number % EVERY == 0:
                    counts[sent(client, data)] += 1
            except Exception:  # whatever it is, it is a finding
                failures.append(f"file {number} of seed {seed}: {traceback.format_exc()}")
                for path in folder.iterdir():  # the next file starts from nothing
                    path.unlink()
    return counts, failures, slowest


@contextmanager
def served() -> Iterator[httpx.Client]:
    """A client of the API in a thread of this process, with a Redis and a store of its own, and the packaged model."""
    with tempfile.TemporaryDirectory(prefix="passion-fuzz-api-") as name:
        folder = Path(name)
        server = RedisServer(folder / "redis", keep=False)
        process = subprocess.Popen(server.command(), stdout=subprocess.DEVNULL)
        try:
            settings = Settings(redis_url=server.url, store=folder / "store", log_level="ERROR", **LIMITS)
            _wait_for(settings)
            listener = listen("127.0.0.1", 0)
            api = uvicorn.Server(uvicorn.Config(create_asgi(settings), log_config=None, timeout_graceful_shutdown=1))
            thread = threading.Thread(target=api.run, kwargs={"sockets": [listener]}, daemon=True)
            thread.start()
            try:
                with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=30) as client:
                    yield client
            finally:
                api.should_exit = True
                thread.join(10)
                listener.close()
        finally:
            process.kill()
            process.wait()


def _wait_for(settings: Settings) -> None:
    client = connect(settings)
    for _ in range(200):
        try:
            client.ping()
            break
        except redis.RedisError:
            time.sleep(0.05)
    client.close()


def table(counts: Counter[str]) -> str:
    """Markdown, most frequent first."""
    out = io.StringIO()
    print("| outcome | files |\n|---|--:|", file=out)
    for outcome, count in sorted(counts.items(), key=lambda item: (item[0].startswith("HTTP"), -item[1])):
        print(f"| {outcome} | {count} |", file=out)
    return out.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first file, to look at one again")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.perf_counter()
    with served() as client:
        numbers = range(arguments.first, arguments.first + arguments.files)
        counts, failures, slowest = survey(numbers, arguments.seed, client)
    print(table(counts))
    print(f"{arguments.files} files in {time.perf_counter() - began:.0f} s, the slowest {slowest * 1e3:.0f} ms")
    for failure in failures[:20]:
        print(failure, file=sys.stderr)
    print(f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
