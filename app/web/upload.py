"""`Upload`: a request's images on their way to the store, counted and checked; kept only if all of them will do."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar, get_args

import anyio
from anyio.to_thread import run_sync
from fastapi import Request

from app.jobs.archive import check_archive, is_zip
from app.jobs.cards import CardError, LabelValueError, ModelCard
from app.jobs.lines import PRIORITIES, Priority
from app.jobs.record import DICOM_NAME, NIFTI_NAME, InputFile, Preprocess
from app.jobs.scan import Scan, check, check_same_field_of_view, magic
from app.jobs.scan_header import ScanError
from app.jobs.series import Series
from app.jobs.settings import Settings
from app.web.multipart import Form, MalformedFormError, PartBegins, PartData, boundary
from app.web.problems import Problem
from app.web.service import Service

if TYPE_CHECKING:
    from _hashlib import HASH

T = TypeVar("T")

MODEL_FIELD, PREPROCESS_FIELD, GRID_FIELD, PROBABILITIES_FIELD = "model", "preprocess", "grid", "probabilities"
ET_VALUE_FIELD, PRIORITY_FIELD = "et_value", "priority"
TEXT_FIELDS = (MODEL_FIELD, PREPROCESS_FIELD, GRID_FIELD, PROBABILITIES_FIELD, ET_VALUE_FIELD, PRIORITY_FIELD)
"""Fields of the form that hold a word and no file."""
MAX_WORD = 128
PREPROCESS: tuple[Preprocess, ...] = get_args(Preprocess)
TRUTHS = {"false": False, "true": True}
ET_VALUES = {"3": 3, "4": 4}
"""What BraTS wrote for enhancing tumour since 2023, and before."""
BUFFER = 1 << 20
"""Bytes of one part in memory before they are written, and so of one upload."""


@dataclass
class Received:
    """One file as it lies on the store before anybody looked into it."""

    field: str
    path: Path
    sha256: HASH = dataclasses.field(default_factory=hashlib.sha256)
    """Of the bytes so far."""
    zipped: bool = False
    """By its first bytes."""


@dataclass(frozen=True)
class Accepted:
    """An upload that will do."""

    model: str
    card: ModelCard
    inputs: tuple[InputFile, ...]
    preprocess: Preprocess
    grid: str
    """The modality on whose grid the mask is to lie; empty: the first given."""
    probabilities: bool
    label_values: dict[str, int]
    """By label: what the mask is to hold, whatever the card says."""
    warnings: tuple[str, ...]
    """Of what was sent, as sentences."""
    priority: Priority
    fingerprint: str
    """Hex SHA-256 of what was sent: equal for the same model, options and bytes as the same modalities in order."""


async def receive(request: Request, service: Service, folder: Path) -> Accepted:
    """Stream a request's images into `folder`, check them, and give them their names. Raises `Problem`."""
    mark = boundary(request.headers.get("content-type"))
    if mark is None:
        raise Problem(
            "not-multipart",
            "the body must be multipart/form-data with one file per modality",
            "With curl: -F flair=@flair.nii.gz -F t2=@t2.nii.gz",
        )
    upload = _Upload(service, folder)
    try:
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > service.settings.max_request_bytes:
            raise _request_too_large(service)
        async with (
            aclosing(upload.counted(request.stream())) as body,
            aclosing(Form(mark).events(body)) as events,
        ):
            async for event in events:
                if isinstance(event, PartBegins):
                    await upload.begin(event)
                elif isinstance(event, PartData):
                    await upload.data(event.data)
                else:
                    await upload.end()
        return await upload.accept()
    except MalformedFormError as error:
        raise Problem("malformed-multipart", str(error), "Send the form with a library rather than by hand.") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Problem("store-full", "there is no room for the upload", "Try again later.") from error
        raise
    finally:
        with anyio.CancelScope(shield=True):
            await upload.close()


class _Upload:
    def __init__(self, service: Service, folder: Path) -> None:
        self._service = service
        self._limits = service.settings
        self._folder = folder
        self._total = 0
        self._words: dict[str, str] = {}
        self._received: list[Received] = []
        self._part: PartBegins | None = None
        self._file: BinaryIO | None = None
        self._buffer = bytearray()
        self._size = 0

    async def counted(self, body: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """The body, up to the limit per request, a piece when it is this upload's turn."""
        async for chunk in body:
            self._total += len(chunk)
            if self._total > self._limits.max_request_bytes:
                raise _request_too_large(self._service)
            async with self._service.turns:
                yield chunk

    async def begin(self, part: PartBegins) -> None:
        self._part, self._size = part, 0
        self._buffer.clear()
        if part.name in TEXT_FIELDS:
            if part.name in self._words:
                raise _bad_word(part.name, f"{part.name} is there twice", "Send it once.")
            return
        self._refuse_strangers(part.name)
        if part.is_blank_choice:
            return
        path = self._folder / f"part-{len(self._received)}"
        self._file = await self._write(lambda: path.open("xb"))
        self._received.append(Received(part.name, path))

    async def data(self, data: bytes) -> None:
        assert self._part is not None
        self._size += len(data)
        self._buffer += data
        if self._part.name in TEXT_FIELDS:
            if self._size > MAX_WORD:
                raise _bad_word(self._part.name, "the word is too long", "GET /docs lists what it takes.")
            return
        if self._file is None:
            raise Problem(
                "empty-file", f"{self._field} has content but no file name", "Send it as a file.", field=self._field
            )
        if self._size > self._limits.max_file_bytes:
            raise Problem(
                "too-large",
                f"{self._field} is larger than {self._limits.max_file_bytes} bytes",
                "Compress it (.nii.gz) or crop it, or ask the operator to raise PASSION_MAX_FILE_BYTES.",
                field=self._field,
            )
        if len(self._buffer) >= BUFFER:
            await self._flush()

    async def end(self) -> None:
        assert self._part is not None
        if self._part.name in TEXT_FIELDS:
            self._words[self._part.name] = self._buffer.decode("utf-8", "replace").strip()
        elif self._file is not None:
            await self._flush()
            await self.close()
            if self._size == 0:
                raise Problem("empty-file", f"{self._field} has no bytes", "Choose the file again.", field=self._field)
        self._part = None

    async def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            await self._write(file.close)

    async def accept(self) -> Accepted:
        """Look into all that was received. Raises `Problem` at the first thing that will not do."""
        name, card = self._chosen()
        preprocess = self._preprocess()
        probabilities = self._probabilities()
        label_values = self._label_values(card)
        priority = self._priority()
        if not self._received:
            raise Problem(
                "no-images",
                "the form has no image",
                f"Send at least one of {', '.join(card.modalities)}; any subset will do.",
            )
        files: dict[str, Received] = {}
        for received in self._received:
            modality = card.canonical(received.field)
            if modality is None:
                raise _unknown_field(received.field, [card])
            if modality in files:
                raise Problem(
                    "duplicate-modality",
                    f"{_short(received.field)} and {_short(files[modality].field)} are the same modality",
                    "Send each modality once.",
                    field=_short(received.field),
                )
            files[modality] = received
        grid = self._grid(card, files)
        scans: list[tuple[str, Scan]] = []
        inputs: list[InputFile] = []
        series: dict[str, Series] = {}
        for modality, received in files.items():
            filename = f"{modality}{DICOM_NAME if received.zipped else NIFTI_NAME}"
            found = await self._check(received, filename)
            if isinstance(found, Series):
                series[received.field] = found
                found = Scan(found.shape, found.affine)
            scans.append((modality, found))
            inputs.append(InputFile(modality=modality, filename=filename))
        warnings = _of_one_patient(series)
        astray = check_same_field_of_view(scans, self._limits.min_overlap)
        if astray is not None:
            first, other = files[inputs[0].modality].field, files[astray].field
            raise Problem(
                "different-field-of-view",
                f"{_short(other)} covers less than {self._limits.min_overlap:.0%} of where {_short(first)} lies",
                "Send images of one session; register them to each other if their headers disagree.",
                field=_short(other),
            )
        options = [name, preprocess, grid, *([PROBABILITIES_FIELD] if probabilities else [])]
        options += [f"{label} {value}" for label, value in label_values.items()]
        fingerprint = _fingerprint(options, files)
        chosen = (name, card, tuple(inputs), preprocess, grid, probabilities, label_values)
        return Accepted(*chosen, warnings, priority, fingerprint)

    async def _check(self, received: Received, filename: str) -> Scan | Series:
        clean = self._folder / filename
        try:
            look = _take if received.zipped else _exchange
            return await run_sync(look, received.path, clean, self._limits, limiter=self._service.checking)
        except ScanError as error:
            raise _scan_problem(received.field, error) from error

    def _preprocess(self) -> Preprocess:
        word = self._words.get(PREPROCESS_FIELD) or PREPROCESS[0]
        for known in PREPROCESS:
            if word == known:
                return known
        known_words = ", ".join(PREPROCESS)
        raise _bad_word(PREPROCESS_FIELD, f"{_short(word)!r} is no way to preprocess", f"Name one of: {known_words}.")

    def _grid(self, card: ModelCard, files: Mapping[str, Received]) -> str:
        word = self._words.get(GRID_FIELD)
        if not word:
            return ""
        modality = card.canonical(word)
        if modality is None or modality not in files:
            detail = f"the mask cannot lie on the grid of {_short(word)!r}, which is not sent"
            raise _bad_word(GRID_FIELD, detail, f"Name one of: {', '.join(files)}.")
        return modality

    def _probabilities(self) -> bool:
        known = TRUTHS.get(self._words.get(PROBABILITIES_FIELD, "false"))
        if known is None:
            detail = f"{PROBABILITIES_FIELD} is neither true nor false"
            raise _bad_word(PROBABILITIES_FIELD, detail, "Send one of the two, or leave it out for false.")
        return known

    def _priority(self) -> Priority:
        word = self._words.get(PRIORITY_FIELD) or PRIORITIES[0]
        known = next((priority for priority in PRIORITIES if priority == word), None)
        if known is None:
            remedy = f"Name one of: {', '.join(PRIORITIES)}."
            raise _bad_word(PRIORITY_FIELD, f"{_short(word)!r} is no priority", remedy)
        return known

    def _label_values(self, card: ModelCard) -> dict[str, int]:
        word = self._words.get(ET_VALUE_FIELD)
        if word and word not in ET_VALUES:
            remedy = f"Name one of: {', '.join(ET_VALUES)}."
            raise _bad_word(ET_VALUE_FIELD, f"{_short(word)!r} is no value for enhancing tumour", remedy)
        try:
            return card.label_values(ET_VALUES[word] if word else None)
        except LabelValueError as error:
            known = f"Name one of: {', '.join(map(str, error.known))}." if error.known else "Leave it out."
            detail = f"the model cannot write enhancing tumour as {word}: {error}"
            raise _bad_word(ET_VALUE_FIELD, detail, known) from error

    def _chosen(self) -> tuple[str, ModelCard]:
        shelf = self._service.models
        name = self._words.get(MODEL_FIELD) or shelf.default()
        known = ", ".join(shelf.names()) or "none"
        if name is None:
            raise Problem(
                "model-not-chosen",
                "no model is named and none is the default",
                f"Name one of: {known}.",
                field=MODEL_FIELD,
            )
        card = self._card(name)
        if card is None:
            raise Problem(
                "unknown-model", f"there is no model {_short(name)!r}", f"Name one of: {known}.", field=MODEL_FIELD
            )
        return name, card

    def _card(self, name: str) -> ModelCard | None:
        try:
            return self._service.models.get(name)
        except CardError as error:
            raise Problem("broken-model", str(error), "The operator must mend the model's card.") from error

    def _refuse_strangers(self, field: str) -> None:
        """Turn a field away before its bytes arrive, as far as that can be known: the model may be named after it."""
        model = self._words.get(MODEL_FIELD)
        cards = [
            card
            for name in ([model] if model else self._service.models.names())
            if (card := self._card(name)) is not None
        ]
        if cards and not any(card.canonical(field) for card in cards):
            raise _unknown_field(field, cards)
        if any(received.field == field for received in self._received):
            raise Problem(
                "duplicate-modality",
                f"{_short(field)} was sent twice",
                "Send each modality once, as one 3-D volume.",
                field=_short(field),
            )

    async def _flush(self) -> None:
        assert self._file is not None
        file, received = self._file, self._received[-1]
        if not self._buffer:
            return
        data = bytes(self._buffer)
        if self._size == len(data):  # the first bytes of the part
            received.zipped = is_zip(data[:4])
            try:
                if not received.zipped:
                    magic(data[:4])
            except ScanError as error:
                raise _scan_problem(self._field, error) from error
        self._buffer.clear()

        def write() -> None:
            file.write(data)
            received.sha256.update(data)

        await self._write(write)

    async def _write(self, call: Callable[[], T]) -> T:
        return await run_sync(call, limiter=self._service.writing)

    @property
    def _field(self) -> str:
        return _short(self._part.name) if self._part else ""


def _exchange(sent: Path, clean: Path, limits: Settings) -> Scan:
    """Check a file, and put its clean copy in its place. Raises `ScanError` and `OSError`."""
    scan = check(sent, clean, limits)
    sent.unlink()
    return scan


def _take(sent: Path, kept: Path, limits: Settings) -> Series:
    """Check a zip and give it its name; its files stay as they are. Raises `ScanError` and `OSError`."""
    series = check_archive(sent, limits)
    sent.rename(kept)
    return series


def _of_one_patient(series: Mapping[str, Series]) -> tuple[str, ...]:
    """What is to be said of series, by field, that may not belong together. Raises `Problem` if they do not."""
    of_patients: dict[str, str] = {}
    for field, one in series.items():
        if one.patient:
            of_patients.setdefault(one.patient, field)
    if len(of_patients) > 1:
        first, other = map(_short, list(of_patients.values())[:2])
        raise Problem(
            "different-patients",
            f"the DICOM headers of {first} and {other} name different patients",
            "Send series of one patient.",
            field=other,
        )
    if len({one.study for one in series.values()}) > 1:
        return (
            f"The DICOM series of {' and '.join(map(_short, series))} are of different studies: see that they show the "
            "same state of the disease, and that the mask is right on each of them.",
        )
    return ()


def _fingerprint(options: list[str], files: dict[str, Received]) -> str:
    sent = [*options, [[modality, received.sha256.hexdigest()] for modality, received in files.items()]]
    return hashlib.sha256(json.dumps(sent).encode()).hexdigest()


def _bad_word(field: str, detail: str, remedy: str) -> Problem:
    return Problem("unknown-model" if field == MODEL_FIELD else "invalid-request", detail, remedy, field=field)


def _scan_problem(field: str, error: ScanError) -> Problem:
    return Problem(error.kind, f"{_short(field)}: {error.detail}", error.remedy, field=_short(field))


def _unknown_field(field: str, cards: list[ModelCard]) -> Problem:
    names = dict.fromkeys(" or ".join([m.name, *m.aliases]) for card in cards for m in card.task.modalities)
    return Problem(
        "unknown-field",
        f"{_short(field)!r} is no modality of the model",
        f"Name the field {'; '.join(names)}.",
        field=_short(field),
    )


def _request_too_large(service: Service) -> Problem:
    return Problem(
        "too-large",
        f"the request is larger than {service.settings.max_request_bytes} bytes",
        "Compress or crop the images, or ask the operator to raise PASSION_MAX_REQUEST_BYTES.",
    )


def _short(name: str) -> str:
    """A name that somebody sent, fit to be sent back."""
    return name if len(name) <= 64 else name[:61] + "..."
