"""DICOM series of MR images, good and bad, as a scanner would write them: whose patient nobody must read of."""

import copy
import io
import zipfile

import numpy as np
from nibabel.eulerangles import euler2mat
from pydicom import FileMetaDataset
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

MR, ENHANCED = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"
PATIENT = "DOE^JANE"
TURN = euler2mat(0.2, -0.1, 0.15)
"""Of an oblique series: columns are the directions of a row, of a column and of the stack (L, P, S)."""


def uid(text):
    return generate_uid(entropy_srcs=[text])


def lps(turn=TURN, spacing=(0.9, 1.1, 1.3), origin=(-20.0, 30.0, -40.0)):
    """Column, row, slice to mm, L P S; `spacing` between columns, rows, slices."""
    affine = np.eye(4)
    affine[:3, :3] = turn * np.array(spacing)
    affine[:3, 3] = origin
    return affine


def ras(affine):
    return np.diag([-1, -1, 1, 1]) @ affine


def series(data, affine=None, name="flair", patient="1234", study="study", slope=1.0, intercept=0.0):
    """Datasets of uint16 (columns, rows, slices), in the order of slices; stored values are `data`."""
    affine = lps() if affine is None else affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    found = []
    for k in range(data.shape[2]):
        d = _common(name, patient, study, uid(f"{name} {k}"), MR)
        d.ImagePositionPatient = [float(f"{v:.6f}") for v in affine[:3, 3] + k * affine[:3, 2]]
        d.ImageOrientationPatient = [
            float(f"{v:.9f}") for v in (affine[:3, 0] / spacing[0]).tolist() + (affine[:3, 1] / spacing[1]).tolist()
        ]
        d.PixelSpacing = [float(f"{spacing[1]:.6f}"), float(f"{spacing[0]:.6f}")]
        d.SliceThickness = float(f"{spacing[2]:.6f}")
        d.RescaleSlope, d.RescaleIntercept = slope, intercept
        d.EchoTime, d.InstanceNumber = 90.0, k + 1
        _pixels(d, data[:, :, k].T)
        found.append(d)
    return found


def enhanced(data, affine=None, name="flair", slope=1.0, order=None):
    """One multi-frame dataset; frames stand in `order` (of slices)."""
    singles = series(data, affine, name)
    d = _common(name, "1234", "study", uid(f"{name} enhanced"), ENHANCED)
    order = list(range(len(singles)) if order is None else order)
    shared = Dataset()
    orientation, measures, rescale = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = singles[0].ImageOrientationPatient
    measures.PixelSpacing, measures.SliceThickness = singles[0].PixelSpacing, singles[0].SliceThickness
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = slope, 0, "US"
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    shared.PixelValueTransformationSequence = [rescale]
    d.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for k in order:
        frame, position, content = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = singles[k].ImagePositionPatient
        content.DimensionIndexValues = [k + 1]
        frame.PlanePositionSequence, frame.FrameContentSequence = [position], [content]
        frames.append(frame)
    d.PerFrameFunctionalGroupsSequence = frames
    _pixels(d, np.stack([data[:, :, k].T for k in order]))
    d.NumberOfFrames = len(order)
    return d


def changed(dataset, **fields):
    """A copy with other values; None takes one away."""
    other = copy.deepcopy(dataset)
    for name, value in fields.items():
        if value is None:
            delattr(other, name)
        else:
            setattr(other, name, value)
    return other


def dicom(dataset):
    """The bytes of a file."""
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def zipped(datasets, **more):
    """The bytes of a zip of datasets, and of other files by name."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("JANE DOE/", b"")
        for n, dataset in enumerate(datasets):
            archive.writestr(f"JANE DOE/IM{n:04}", dicom(dataset))
        for name, data in more.items():
            archive.writestr(name, data)
    return file.getvalue()


def _common(name, patient, study, instance, sop_class):
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.MediaStorageSOPClassUID, d.file_meta.MediaStorageSOPInstanceUID = sop_class, instance
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.SOPClassUID, d.SOPInstanceUID = sop_class, instance
    d.PatientName, d.PatientID, d.PatientBirthDate, d.PatientSex = PATIENT, patient, "19700101", "F"
    d.StudyInstanceUID, d.SeriesInstanceUID = uid(study), uid(f"{study} {name}")
    d.FrameOfReferenceUID = uid(f"{study} frame")
    d.StudyID, d.StudyDate, d.StudyTime, d.AccessionNumber, d.ReferringPhysicianName = "1", "20260101", "1200", "", ""
    d.SeriesNumber, d.SeriesDescription, d.Modality, d.ImageType = 3, PATIENT, "MR", ["ORIGINAL", "PRIMARY", "M"]
    d.Manufacturer, d.PositionReferenceIndicator = "Phantoms", ""
    return d


def _pixels(d, array):
    d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
    d.Rows, d.Columns = array.shape[-2:]
    d.BitsAllocated = d.BitsStored = 16
    d.HighBit, d.PixelRepresentation = 15, 0
    d.PixelData = np.ascontiguousarray(array, "<u2").tobytes()
