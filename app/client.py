"""`Client`: the way of a request seen from outside: send, poll, fetch. Needs httpx and nothing of the service's."""

from __future__ import annotations

import gzip
import os
import time
import uuid
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

import httpx

POLL_FIRST, POLL_MOST = 0.2, 2.0
LATER = {429, 503}
"""Answers that may be others in a moment."""

OnBytes = Callable[[int], None]
OnJob = Callable[[dict[str, Any]], None]


class ClientError(RuntimeError):
    """The mask was not had. The message says why, in one line; `refused` if the images must be changed first."""

    def __init__(self, message: str, refused: bool = False, status: int | None = None) -> None:
        super().__init__(message)
        self.refused = refused
        self.status = status
        """Of the service's answer; None if there was none."""


@dataclass(frozen=True)
class Patience:
    """How long to try again, in seconds, with a service that is away, and with one that is full."""

    away: float = 60.0
    full: float = 60.0
    sleep: Callable[[float], None] = time.sleep
    """May raise, to stop."""


class _Watched:
    """A file that tells how much of it was read. What httpx asks of a file, and no more."""

    def __init__(self, file: BinaryIO, on_bytes: OnBytes) -> None:
        self._file = file
        self._on_bytes = on_bytes

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._on_bytes(len(data))
        return data

    def fileno(self) -> int:
        return self._file.fileno()


class _LaterError(Exception):
    """Not now; perhaps after so many seconds."""

    def __init__(self, error: ClientError, seconds: float) -> None:
        super().__init__(str(error))
        self.error = error
        self.seconds = seconds


class _Pause:
    """Sleeps between attempts, for as long as patience has it."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._began = time.monotonic()

    def __call__(self, error: ClientError, seconds: float) -> bool:
        """Whether to try again, after that many seconds."""
        most = self._patience.full if error.status in LATER else self._patience.away
        if time.monotonic() + seconds > self._began + most:
            return False
        self._patience.sleep(seconds)
        return True


class Client:
    """Talks to one service. Methods raise `ClientError`."""

    def __init__(self, url: str, key: str | None = None, patience: Patience = Patience()) -> None:
        """`key` is an API key, for a service that asks for one."""
        self._url = url.rstrip("/")
        self._patience = patience
        # Reading has a long limit: after the last byte the service looks through all the voxels before it answers.
        timeout = httpx.Timeout(30, read=600, write=120)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=self._url, timeout=timeout, headers=headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def modalities(self, model: str | None) -> dict[str, list[str]]:
        """What a model takes, by default the service's own choice: names to aliases, in the model's order."""
        try:
            served = self._answer(self._http.get("/models")).get("models", [])
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        chosen = next((m for m in served if (m["name"] == model if model else m["default"])), None)
        if chosen is None:
            names = ", ".join(m["name"] for m in served) or "there is none"
            what = f"there is no model {model!r}" if model else "the service has no default model"
            raise ClientError(f"{what}. Name one of: {names}", refused=True)
        return {modality["name"]: modality["aliases"] for modality in chosen["modalities"]}

    def fields(self) -> dict[str, Any]:
        """The form of POST /segment as the service's own document has it: JSON schemas by field."""
        try:
            document = self._answer(self._http.get("/openapi.json"))
            form = document["paths"]["/segment"]["post"]["requestBody"]["content"]["multipart/form-data"]
            return cast(dict[str, Any], form["schema"]["properties"])
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except (KeyError, TypeError) as error:
            raise ClientError(f"{self._url} does not describe itself as PASSION Seg does") from error

    def submit(
        self, images: Mapping[str, Path], form: Mapping[str, str], on_bytes: OnBytes, name: str | None = None
    ) -> dict[str, Any]:
        """Send the images, keyed by modality, in order, and the form's words. The names of the files stay here: they
        often name a patient. `name`: of this request; the same one again gives the same job."""
        # One name for however many attempts: if the answer to one is lost, the next one gets the same job.
        headers = {"Idempotency-Key": name or str(uuid.uuid4())}
        pause = _Pause(self._patience)
        while True:
            try:
                return self._send(images, form, on_bytes, headers)
            except _LaterError as later:
                if not pause(later.error, later.seconds):
                    raise later.error from later.error.__cause__

    def _send(
        self, images: Mapping[str, Path], form: Mapping[str, str], on_bytes: OnBytes, headers: dict[str, str]
    ) -> dict[str, Any]:
        files: dict[str, Any] = {}
        sent = 0

        def count(size: int) -> None:
            nonlocal sent
            sent += size
            on_bytes(size)

        try:
            for name, path in images.items():
                suffix = ".nii.gz" if path.name.endswith(".gz") else ".nii"
                files[name] = (f"{name}{suffix}", _Watched(path.open("rb"), count), "application/octet-stream")
            response = self._http.post("/segment", files=files, data=dict(form), headers=headers)
            if response.status_code in LATER:
                on_bytes(-sent)
                raise _LaterError(_refusal(response), _seconds(response))
            return self._answer(response)
        except httpx.ConnectError as error:
            raise self._unreachable(error) from error
        except httpx.TransportError as error:  # cut off; what became of it is not known
            on_bytes(-sent)
            raise _LaterError(self._unreachable(error), 1.0) from error
        except OSError as error:
            raise ClientError(f"{error.filename}: {error.strerror}", refused=True) from error
        finally:
            for _, watched, _ in files.values():
                watched._file.close()

    def wait(self, job: dict[str, Any], on_job: OnJob) -> dict[str, Any]:
        """Poll until the job is over. Raises for one that did not succeed."""
        pause = POLL_FIRST
        while job["state"] in ("queued", "running"):
            self._patience.sleep(pause)
            pause = min(pause * 1.3, POLL_MOST)
            job = self.look(job["links"]["self"])
            on_job(job)
        if job["state"] != "succeeded":
            error = job.get("error") or {}
            raise ClientError(f"the job has {job['state']}: {error.get('detail', 'no reason was given')}")
        return job

    def look(self, address: str) -> dict[str, Any]:
        """The job at an address, as it is now. A service that is away for a moment is waited for: the job is not lost
        by that."""
        return self._answer(self._get(address))

    def _get(self, address: str) -> httpx.Response:
        """An answer that is not to be another one in a moment."""
        pause = _Pause(self._patience)
        while True:
            try:
                # Results may lie in a bucket, where nobody is to see our key: to another host httpx sends none.
                response = self._http.get(address, follow_redirects=True)
                if response.status_code not in LATER:
                    return response
                failure, seconds = _refusal(response), _seconds(response)
            except httpx.TransportError as error:
                failure, seconds = self._unreachable(error), 1.0
            if not pause(failure, seconds):
                raise failure

    def fetch(self, address: str, out: Path) -> None:
        """Write what is at an address, whole or not at all. Gzipped NIfTI is unpacked where `out` says `.nii`."""
        temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        try:
            response = self._get(address)
            if response.is_error:
                raise _refusal(response)
            data = response.content
            if response.headers.get("Content-Type") == "application/gzip":
                nifti = gzip.decompress(data)  # its check sum says whether all of it arrived
                data = data if out.name.endswith(".gz") else nifti
            temporary.write_bytes(data)
            os.replace(temporary, out)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ClientError(f"{out.name} arrived damaged; its job is kept, try again") from error
        except OSError as error:
            raise ClientError(f"cannot write {out}: {error.strerror}") from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def delete(self, job: dict[str, Any]) -> None:
        """Stop a job and remove its files."""
        try:
            self._http.delete(job["links"]["self"])
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _answer(self, response: httpx.Response) -> dict[str, Any]:
        if response.is_error:
            raise _refusal(response)
        try:
            return cast(dict[str, Any], response.json())
        except ValueError as error:
            raise ClientError(f"{self._url} does not answer as PASSION Seg does; is the address right?") from error

    def _unreachable(self, error: httpx.HTTPError) -> ClientError:
        return ClientError(f"cannot reach {self._url}: {error or type(error).__name__}")


def _seconds(response: httpx.Response) -> float:
    """How long to wait, as the service has it."""
    said = response.headers.get("Retry-After", "")
    return min(float(said), 30.0) if said.isdecimal() else 2.0


def _refusal(response: httpx.Response) -> ClientError:
    if response.status_code == httpx.codes.UNAUTHORIZED:
        sent = "Authorization" in response.request.headers
        wants = "does not take the API key in PASSION_KEY" if sent else "asks for an API key: put it into PASSION_KEY"
        return ClientError(
            f"the service {wants}; its operator makes one with `passion-server keys create`", True, response.status_code
        )
    try:
        problem = response.json()
        words = [problem.get("detail") or problem["title"], problem.get("remedy")]
    except (ValueError, KeyError, AttributeError):
        words = [f"the service answered {response.status_code}"]
    status = response.status_code
    return ClientError(". ".join(w.rstrip(".") for w in words if w), 400 <= status < 500, status)
