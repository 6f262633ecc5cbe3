"""DICOM series as volumes, and masks as DICOM SEG, against highdicom's own reading of both."""

import zipfile
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
import tiny_checkpoint
from dicom_scans import PATIENT, changed, dicom, enhanced, lps, ras, series, zipped
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from models.card import load_card
from models.dicom import DicomSeries, is_series
from models.dicom_seg import NOTICE, NoSegError, save_dicom_seg
from models.predictor import Segmentation
from models.task import Task
from models.volume import VolumeError

DATA = np.random.default_rng(1).integers(0, 60000, (7, 6, 5)).astype(np.uint16)


@pytest.fixture
def save(tmp_path):
    def save(datasets, **more):
        path = tmp_path / "series.zip"
        path.write_bytes(zipped(datasets, **more))
        return path

    return save


def test_the_api_reads_series_as_the_worker_does():
    root = Path(__file__).parents[2]
    assert (root / "app/jobs/series.py").read_text() == (root / "models/series.py").read_text()


@pytest.mark.parametrize("backwards", [False, True])
def test_voxels_and_affine_whatever_the_files_order(save, backwards):
    """Oblique, files shuffled; also with slices that were counted from the other end."""
    affine, data = lps(), DATA
    datasets = series(data, affine, slope=0.5, intercept=-7)
    if backwards:
        for k, dataset in enumerate(datasets):
            dataset.InstanceNumber = len(datasets) - k
    shuffled = [datasets[k] for k in (3, 0, 4, 2, 1)]
    volume = DicomSeries.open(save(shuffled)).volume()
    np.testing.assert_allclose(volume.grid.affine, ras(affine), atol=1e-4)
    np.testing.assert_array_equal(volume.data, DATA * 0.5 - 7)
    assert volume.grid.zooms == pytest.approx((0.9, 1.1, 1.3), abs=1e-5)
    assert (int(volume.grid.header["qform_code"]), int(volume.grid.header["sform_code"])) == (1, 1)
    np.testing.assert_allclose(volume.grid.header.get_qform(), volume.grid.affine, atol=1e-4)
    other = hd.get_volume_from_series(shuffled, rtol=0.02).flip_spatial(0)  # it stacks against the normal
    np.testing.assert_allclose(
        volume.grid.affine, ras(other.affine[:, [2, 1, 0, 3]]), atol=1e-4, err_msg="highdicom has it elsewhere"
    )
    np.testing.assert_allclose(volume.data, other.array.transpose(2, 1, 0), atol=1e-2)


def test_a_stack_against_its_normal(save):
    """Slices that were written from the top down: the volume goes up, each voxel stays where it is."""
    affine = lps()
    down = affine.copy()
    down[:3, 2], down[:3, 3] = -affine[:3, 2], affine[:3, 3] + 4 * affine[:3, 2]
    volume = DicomSeries.open(save(series(DATA[:, :, ::-1], down))).volume()
    np.testing.assert_allclose(volume.grid.affine, ras(affine), atol=1e-4)
    np.testing.assert_array_equal(volume.data, DATA)


def test_a_folder_and_what_computers_leave_in_it(tmp_path, save):
    folder = tmp_path / "flair"
    (folder / "sub").mkdir(parents=True)
    for k, dataset in enumerate(series(DATA)):
        (folder / "sub" / f"{k}").write_bytes(dicom(dataset))
    (folder / ".DS_Store").write_bytes(b"x")
    assert is_series(folder)
    np.testing.assert_array_equal(DicomSeries.open(folder).volume().data, DATA)
    path = save(series(DATA), **{"__MACOSX/._IM0000": b"x"})
    assert is_series(path)
    np.testing.assert_array_equal(DicomSeries.open(path).volume().data, DATA)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_compressed(save, tmp_path, syntax):
    smooth = (DATA[:4, :4, :3].repeat(12, 0).repeat(12, 1) + np.arange(48, dtype=np.uint16)[:, None, None]) // 2
    datasets = series(smooth)
    for dataset in datasets:
        plugin = {RLELossless: "pydicom", JPEGLSLossless: "pyjpegls", JPEG2000Lossless: None}[syntax]
        if plugin is None:
            _to_jpeg2000(dataset, tmp_path / "j2k.dcm")
        else:
            dataset.compress(syntax, encoding_plugin=plugin, generate_instance_uid=False)
    np.testing.assert_array_equal(DicomSeries.open(save(datasets)).volume().data, smooth)


def _to_jpeg2000(dataset, file):
    import gdcm

    image, change = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax()
    file.write_bytes(dicom(dataset))
    image.SetFileName(str(file))
    assert image.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEG2000Lossless))
    change.SetInput(image.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(image.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(file))
    assert writer.Write()
    read = pydicom.dcmread(file)
    dataset.update(read)
    dataset.file_meta = read.file_meta


def test_many_frames_in_one_file(save):
    order = [2, 0, 4, 1, 3]
    path = save([enhanced(DATA, slope=2.0, order=order)])
    volume = DicomSeries.open(path).volume()
    np.testing.assert_array_equal(volume.data, DATA * 2.0)
    np.testing.assert_allclose(volume.grid.affine, ras(lps()), atol=1e-4)


def test_what_is_refused_says_nothing_of_the_patient(save):
    good = series(DATA)
    bad = {
        "2 series": good + series(DATA, name="t2"),
        "1 of its images twice": [*good, good[0]],
        "2 patients": [changed(good[0], PatientID="5"), *good[1:]],
        "2 echo times": [changed(good[0], EchoTime=20.0), *good[1:]],
        "as if 1 were missing": good[:2] + good[3:],
        "lie where another one does": [*good, changed(good[0], SOPInstanceUID="1.2.3")],
        "localiser": [changed(d, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]) for d in good],
        "different directions": [changed(good[0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0]), *good[1:]],
        "no MR image": [changed(d, SOPClassUID="1.2.840.10008.5.1.4.1.1.2") for d in good],
        "damaged or lacks": [changed(d, PixelSpacing=None) for d in good],
        "one slice": good[:1],
        "no DICOM image": [],
        "one value": series(np.ones_like(DATA)),
        "not DICOM": good,
    }
    for text, datasets in bad.items():
        more = {"README.txt": b"DOE^JANE"} if text == "not DICOM" else {}
        with pytest.raises(VolumeError, match=text) as raised:
            DicomSeries.open(save(datasets, **more)).volume()
        assert "JANE" not in str(raised.value).upper(), text
    path = save(good)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(VolumeError, match="zip is damaged"):
        DicomSeries.open(path)


@pytest.mark.parametrize("frames", ["single", "multi"])
def test_a_mask_as_dicom_seg(save, tmp_path, frames):
    tiny = tiny_checkpoint.make(tmp_path / "tiny")
    source = DicomSeries.open(
        save(series(DATA)[::-1] if frames == "single" else [enhanced(DATA, order=[4, 2, 0, 1, 3])])
    )
    grid = source.volume().grid
    classes = np.random.default_rng(2).choice([0, 0, 1, 3], DATA.shape).astype(np.uint8)
    classes[:, :, 1] = 0
    task = Task.load("glioma")
    path = tmp_path / "mask.dcm"
    save_dicom_seg(Segmentation(classes, grid, task), source, load_card(tiny), path)

    seg = hd.seg.segread(path)
    assert [seg.get_segment_description(n).SegmentLabel for n in (1, 2)] == ["necrotic core", "enhancing tumour"]
    assert seg.number_of_segments == 2
    assert [seg.get_segment_description(n).segmented_property_type.value for n in (1, 2)] == ["6574001", "108369006"]
    assert (seg.PatientName, seg.ContentDescription) == (PATIENT, NOTICE)
    assert "not a medical device" in seg.SeriesDescription
    np.testing.assert_array_equal(in_place(seg, grid, {1: 1, 2: 3}), classes)
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(NoSegError, match="empty"):
        save_dicom_seg(Segmentation(np.zeros_like(classes), grid, task), source, load_card(tiny), tmp_path / "no.dcm")
    assert not (tmp_path / "no.dcm").exists()


def in_place(seg, grid, values):
    """Segments on a NIfTI grid, voxel by voxel through the patient's space; `values` by segment number."""
    volume = seg.get_volume(combine_segments=True, allow_missing_positions=True)
    indices = np.argwhere(volume.array)
    mm = np.c_[indices, np.ones(len(indices))] @ ras(volume.affine).T
    voxels = mm @ np.linalg.inv(grid.affine).T
    places = np.rint(voxels[:, :3]).astype(int)
    assert np.abs(voxels[:, :3] - places).max() < 0.01
    found = np.zeros(grid.shape, np.uint8)
    found[tuple(places.T)] = [values[int(n)] for n in volume.array[tuple(indices.T)]]
    return found


def test_a_zip_is_not_unpacked(tmp_path, save):
    path = save(series(DATA), **{"../../evil": dicom(changed(series(DATA)[0], SOPInstanceUID="1.2"))})
    with pytest.raises(VolumeError):
        DicomSeries.open(path)
    assert zipfile.is_zipfile(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["series.zip"]
