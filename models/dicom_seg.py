"""A mask as DICOM SEG, for viewers and archives: one segment per label, on the slices of the series it was made of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.card import Card, software_versions
from models.dicom import DicomSeries
from models.volume import VolumeError

if TYPE_CHECKING:
    from models.predictor import Segmentation

NAME, NOTICE = "PASSION Seg", "Research use, not a medical device; not for diagnosis"
ABNORMAL, TISSUE = ("49755003", "Morphologically Abnormal Structure"), ("85756007", "Tissue")
"""SNOMED CT code and meaning: categories of segments; the second for labels whose code we do not know."""
NECROSIS, OEDEMA, NEOPLASM = ("6574001", "Necrosis"), ("79654002", "Edema"), ("108369006", "Neoplasm")
CODES = {
    **dict.fromkeys(("necrotic core", "necrosis"), NECROSIS),
    **dict.fromkeys(("oedema", "edema"), OEDEMA),
    **dict.fromkeys(("enhancing tumour", "enhancing tumor"), NEOPLASM),
}
"""By a label's name in lower case."""
ONLY_GLIOMA = "glioma"
"""What the names of tasks start with in whose masks the codes mean what they say."""


class NoSegError(ValueError):
    """No DICOM SEG can be made of a mask. The message says why."""


def save_dicom_seg(segmentation: Segmentation, source: DicomSeries, card: Card, path: Path) -> None:
    """Write the mask, whole or not at all. `source`: the series on whose grid it lies, from which the file takes
    patient and study. Labels without a voxel have no segment, slices without one no frame.

    Raises `NoSegError` for an empty mask and for one that does not lie on the series' grid.
    """
    if segmentation.empty:
        raise NoSegError("the mask is empty, and a DICOM SEG without a segment is none")
    if segmentation.grid.shape != source.series.shape:
        raise NoSegError("the mask does not lie on the series' grid")
    dataset = _dataset(segmentation, source, card)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        dataset.save_as(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _dataset(segmentation: Segmentation, source: DicomSeries, card: Card) -> Any:
    import highdicom as hd
    from pydicom.sr.coding import Code

    task = segmentation.task
    there = [index for index in range(1, len(task.labels)) if (segmentation.classes == index).any()]
    numbers = np.zeros(len(task.labels), np.uint8)
    numbers[there] = np.arange(1, len(there) + 1)
    slices = numbers[segmentation.classes].transpose(2, 1, 0)  # slices, rows, columns
    version = software_versions().get("passion-seg", "unknown")
    algorithm = hd.AlgorithmIdentificationSequence(
        name=NAME,
        version=version,
        family=Code("123110", "DCM", "Artificial Intelligence"),
        source=card.name[:64],
        parameters={"model": card.name, "weights_sha256": card.weights_sha256},
    )

    def segment(number: int, label: str) -> Any:
        known = CODES.get(label.lower()) if task.name.startswith(ONLY_GLIOMA) else None
        category, kind = (ABNORMAL, known) if known else (TISSUE, TISSUE)
        return hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=label[:64],
            segmented_property_category=Code(category[0], "SCT", category[1]),
            segmented_property_type=Code(kind[0], "SCT", kind[1]),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )

    headers = source.headers()
    if len(headers) == 1:  # one file: its frames as they are in it
        images, frames = headers, np.empty_like(slices)
        for rank, (_, frame) in enumerate(source.series.order):
            frames[frame] = slices[rank]
    elif len(headers) == len(source.series.order):
        images, frames = [headers[file] for file, _ in source.series.order], slices
    else:
        raise VolumeError("a series of several files with several slices each has no DICOM SEG")
    return hd.seg.Segmentation(
        source_images=images,
        pixel_array=frames,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[segment(int(numbers[i]), task.labels[i].name) for i in there],
        series_instance_uid=hd.UID(),
        series_number=1000,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer=NAME,
        manufacturer_model_name=card.name[:64],
        software_versions=version,
        device_serial_number=card.weights_sha256[:16] or "unknown",
        content_label="SEGMENTATION",
        content_description=NOTICE,
        series_description=f"{NAME} (research use, not a medical device)",
    )
