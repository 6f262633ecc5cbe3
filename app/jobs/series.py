"""`Series`: the headers of one DICOM series of MR images, and where its slices are.

`app/jobs/series.py` is this file once more: the API may import nothing of `models`. A test holds the two to be equal.
"""

from __future__ import annotations

import hashlib
import io
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from types import ModuleType

Vector = tuple[float, ...]

MR, ENHANCED_MR, DIRECTORY = (
    "1.2.840.10008.5.1.4.1.1.4",
    "1.2.840.10008.5.1.4.1.1.4.1",
    "1.2.840.10008.1.3.10",
)
"""SOP classes."""
SYNTAXES = {
    *("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5"),
    *(f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81, 90, 91)),
}
"""Transfer syntaxes that are read: uncompressed, RLE, JPEG, JPEG-LS, JPEG 2000. Not the deflated one, whose header may
unpack to anything."""
META, DEFLATED = 144, b"1.2.840.10008.1.2.1.99"
"""Bytes before the first element that says how the rest is written, and the syntax that is not even tried."""
ITEM, MOST_ITEMS = b"\xfe\xff\x00\xe0", 100_000
"""How an item of a sequence begins, and how many there may be: each becomes some kilobytes of objects. A volume of 400
frames has some 10 000."""
GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
TAGS: list[int | str] = [
    *("SOPClassUID", "SOPInstanceUID", "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
    *("ImageType", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated"),
    *("NumberOfFrames", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "EchoTime"),
    *("TemporalPositionIdentifier", "RescaleSlope", "RescaleIntercept", *GROUPS),
]
"""All that is read of a header."""
RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""DICOM's world axes (L, P, S) to NIfTI's (R, A, S), and back."""
SAME_DIRECTION = 1e-3
SAME_PLACE_MM = 0.01
UNEVEN = 0.02
"""Share of the distance between slices by which one may differ. Positions are written in few digits."""
SHIFTED_MM = 0.1
ONE_SERIES = "Send one series of MR slices that make one volume, as a zip of its DICOM files."
AGAIN = "Export the whole series again."


class SeriesError(Exception):
    """Files that are no series we can use: `kind` for programs, `detail` and `remedy` for people. Holds no text of a
    header."""

    def __init__(self, kind: str, detail: str, remedy: str = ONE_SERIES) -> None:
        super().__init__(f"{detail}. {remedy}")
        self.kind = kind
        self.detail = detail
        self.remedy = remedy


@dataclass(frozen=True)
class Plane:
    """One slice."""

    position: Vector
    """mm (L, P, S) of the centre of the first pixel."""
    orientation: Vector
    """Unit vectors (L, P, S): along a row, then along a column."""
    spacing: Vector
    """mm between rows, and between columns."""
    slope: float
    intercept: float
    echo: float | None
    """ms"""
    time: int | None
    """Place among repetitions."""


@dataclass(frozen=True)
class Instance:
    """What one file's header says."""

    uid: str
    patient: str
    """SHA-256 of the patient's ID; empty if it has none."""
    study: str
    series: str
    frame_of_reference: str
    localiser: bool
    rows: int
    columns: int
    planes: tuple[Plane, ...]
    header_bytes: int
    """How long the header is."""

    @classmethod
    def parse(cls, head: bytes) -> Self | None:
        """From a file's bytes, at least those before its pixels; None for an index of a disc (DICOMDIR). Raises
        `SeriesError`."""
        try:
            file = io.BytesIO(head)
            dataset = _header(head, file)
            if dataset is None:
                return None
            return cls(
                uid=str(dataset.SOPInstanceUID),
                patient=_digest(str(dataset.get("PatientID") or "").strip()),
                study=str(dataset.StudyInstanceUID),
                series=str(dataset.SeriesInstanceUID),
                frame_of_reference=str(dataset.get("FrameOfReferenceUID") or ""),
                localiser="LOCALIZER" in [str(word).upper() for word in dataset.get("ImageType") or []],
                rows=int(dataset.Rows),
                columns=int(dataset.Columns),
                planes=tuple(_planes(dataset)),
                header_bytes=file.tell(),
            )
        except SeriesError:
            raise
        except Exception:  # pydicom raises many kinds for what is damaged, and quotes the header
            raise SeriesError("bad-header", "a DICOM header is damaged or lacks what places its slice", AGAIN) from None


@dataclass(frozen=True)
class Series:
    """Slices that make one volume."""

    shape: tuple[int, int, int]
    """Columns, rows, slices."""
    affine: npt.NDArray[np.float64]
    """(4, 4): indices in that order to mm, world axes R, A, S."""
    order: tuple[tuple[int, int], ...]
    """Of each slice the place of its file among those given, and its own place in that file."""
    patient: str
    study: str

    @classmethod
    def of(cls, instances: Sequence[Instance]) -> Self:
        """Raises `SeriesError` for what makes no volume, or more than one."""
        if not instances:
            raise SeriesError("not-dicom", "there is no DICOM image in it")
        if any(i.localiser for i in instances):
            raise SeriesError("not-mr-image", "it holds localiser images, which only plan a scan")
        for what, values in (
            ("patients", {i.patient for i in instances}),
            ("studies", {i.study for i in instances}),
            ("series", {i.series for i in instances}),
            ("frames of reference", {i.frame_of_reference for i in instances}),
            ("sizes of slices", {(i.rows, i.columns) for i in instances}),
            ("echo times", {p.echo for i in instances for p in i.planes}),
            ("points in time", {p.time for i in instances for p in i.planes}),
        ):
            if len(values) > 1:
                raise SeriesError("mixed-series", f"it holds {len(values)} {what}", f"Send one. {ONE_SERIES}")
        twice = len(instances) - len({i.uid for i in instances})
        if twice:
            raise SeriesError("bad-slices", f"it holds {twice} of its images twice", "Send each image once.")
        places = [(i, p) for i, instance in enumerate(instances) for p in range(len(instance.planes))]
        planes = [instances[i].planes[p] for i, p in places]
        first = planes[0]
        affine, ranks = _stack(planes)
        one = instances[0]
        _finite(affine, first)
        shape = (one.columns, one.rows, len(planes))
        return cls(shape, affine, tuple(places[rank] for rank in ranks), one.patient, one.study)


def is_junk(name: str) -> bool:
    """Whether a file's name shows that a computer left it there, such as macOS in its zips."""
    parts = PurePosixPath(name).parts
    return not parts or parts[0] == "__MACOSX" or parts[-1].startswith(".") or parts[-1] in {"Thumbs.db", "desktop.ini"}


def _stack(planes: Sequence[Plane]) -> tuple[npt.NDArray[np.float64], list[int]]:
    """The affine, and the planes' places in the order along the normal."""
    orientations = np.array([p.orientation for p in planes])
    spacings = np.array([p.spacing for p in planes])
    positions = np.array([p.position for p in planes])
    row, column = orientations[0, :3], orientations[0, 3:]
    units = np.array([row @ row, column @ column, row @ column])
    if not np.allclose(units, [1, 1, 0], atol=SAME_DIRECTION * 10):
        raise SeriesError("bad-affine", "the directions of rows and columns are no right angle", AGAIN)
    if np.abs(orientations - orientations[0]).max() > SAME_DIRECTION:
        raise SeriesError("mixed-series", "its slices lie in different directions")
    if np.abs(spacings / spacings[0] - 1).max() > SAME_DIRECTION:
        raise SeriesError("mixed-series", "its slices have pixels of different sizes")
    if len(planes) < 2:
        raise SeriesError("too-few-voxels", "it holds one slice", "Send the whole series.")
    normal = np.cross(row, column)
    along = positions @ normal
    ranks = [int(n) for n in np.argsort(along, kind="stable")]
    gaps = np.diff(along[ranks])
    same = int((gaps < SAME_PLACE_MM).sum())
    if same:
        raise SeriesError("bad-slices", f"{same} of its {len(planes)} slices lie where another one does")
    usual = float(np.median(gaps))
    off = np.abs(gaps - usual) > UNEVEN * usual + SAME_PLACE_MM
    if off.any():
        missing = int(np.rint(gaps / usual - 1).clip(0).sum())
        detail = f"its {len(planes)} slices are not evenly spaced: {gaps.min():.4g} mm to {gaps.max():.4g} mm apart"
        raise SeriesError("bad-slices", detail + (f", as if {missing} were missing" if missing else ""), AGAIN)
    step = (positions[ranks[-1]] - positions[ranks[0]]) / (len(planes) - 1)
    straight = positions[ranks[0]] + np.arange(len(planes))[:, None] * step
    aside = step - (step @ normal) * normal
    if np.abs(positions[ranks] - straight).max() > SHIFTED_MM + UNEVEN * usual or np.abs(aside).max() > UNEVEN * usual:
        raise SeriesError("bad-slices", "its slices are shifted against each other (a tilted gantry?)", AGAIN)
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1], lps[:3, 2] = row * spacings[0, 1], column * spacings[0, 0], step
    lps[:3, 3] = positions[ranks[0]]
    return RAS @ lps, ranks


def _finite(affine: npt.NDArray[np.float64], plane: Plane) -> None:
    if not (np.isfinite(affine).all() and np.isfinite([plane.slope, plane.intercept]).all()):
        raise SeriesError("bad-affine", "the slices' places are not finite numbers", AGAIN)


def _header(head: bytes, file: io.BytesIO) -> Any:
    """The dataset of a file that holds MR, read from `file`, which is `head`, up to its pixels; None for a DICOMDIR."""
    pydicom = quiet_pydicom()
    if head[128:132] != b"DICM":
        raise SeriesError("not-dicom", "it holds a file that is not DICOM", ONE_SERIES)
    start = head[: META + int.from_bytes(head[META - 4 : META], "little")]
    meta = {} if DEFLATED in start else pydicom.dcmread(io.BytesIO(start)).file_meta
    if str(meta.get("MediaStorageSOPClassUID")) == DIRECTORY:
        return None
    if str(meta.get("TransferSyntaxUID")) not in SYNTAXES:
        raise SeriesError(
            "bad-data-type", "its images are encoded in a way that is not read", "Export them uncompressed."
        )
    if head.count(ITEM) > MOST_ITEMS:
        raise SeriesError("bad-header", "a DICOM header has too many parts", AGAIN)
    dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=TAGS)
    if str(dataset.SOPClassUID) not in {MR, ENHANCED_MR}:
        raise SeriesError("not-mr-image", "it holds DICOM that is no MR image, such as a report or another scan's kind")
    if int(dataset.SamplesPerPixel) != 1 or dataset.PhotometricInterpretation != "MONOCHROME2":
        raise SeriesError("bad-data-type", "its images are in colour or inverted", "Send the grey images themselves.")
    return dataset


def _planes(dataset: Any) -> list[Plane]:
    if str(dataset.SOPClassUID) == MR:
        if int(dataset.get("NumberOfFrames") or 1) != 1:
            raise SeriesError("bad-header", "an image of one slice says that it has several", AGAIN)
        groups: list[tuple[Any, Any]] = []
    else:
        shared, frames = (dataset[name].value for name in GROUPS)
        if len(frames) != int(dataset.NumberOfFrames):
            raise SeriesError("bad-header", "an image has more or fewer frames than it says", AGAIN)
        groups = [(frame, shared[0]) for frame in frames]
    return [_plane_of_frame(*group) for group in groups] or [_plane(dataset, dataset, dataset, dataset, dataset)]


def _plane_of_frame(frame: Any, shared: Any) -> Plane:
    def group(name: str) -> Any:
        found = frame.get(name) or shared.get(name)
        return found[0] if found else {}

    rescale, echo = group("PixelValueTransformationSequence"), group("MREchoSequence")
    plane = _plane(
        group("PlanePositionSequence"),
        group("PlaneOrientationSequence"),
        group("PixelMeasuresSequence"),
        rescale,
        {"EchoTime": echo.get("EffectiveEchoTime")},
    )
    content = group("FrameContentSequence")
    time = content.get("TemporalPositionIndex")
    return plane if time is None else Plane(**{**vars(plane), "time": int(time)})


def _plane(position: Any, orientation: Any, measures: Any, rescale: Any, echo: Any) -> Plane:
    slope, intercept = rescale.get("RescaleSlope"), rescale.get("RescaleIntercept")
    time, echo_time = echo.get("TemporalPositionIdentifier"), echo.get("EchoTime")
    return Plane(
        position=_numbers(position["ImagePositionPatient"], 3),
        orientation=_numbers(orientation["ImageOrientationPatient"], 6),
        spacing=_numbers(measures["PixelSpacing"], 2, least=1e-6),
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        echo=None if echo_time is None else float(echo_time),
        time=None if time is None else int(time),
    )


def _numbers(element: Any, count: int, least: float = -1e6) -> Vector:
    values = tuple(float(v) for v in element.value)
    if len(values) != count or not all(least <= v <= 1e6 for v in values):
        raise SeriesError("bad-affine", "a slice's place, directions or spacing make no sense", AGAIN)
    return values


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() if text else ""


@cache
def quiet_pydicom() -> ModuleType:
    """pydicom, imported where it is used, and told to keep its complaints to itself: they quote headers."""
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    warnings.filterwarnings("ignore", module=r"(pydicom|highdicom)\b.*")
    logging.getLogger("pydicom").disabled = True
    return pydicom
