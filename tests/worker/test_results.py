"""What a run leaves beside the mask, in this process: a real Redis, a real store, a real (small) checkpoint."""

import gzip
import hashlib
import io
import shutil

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
from dicom_scans import lps, ras, series, zipped
from nibabel.eulerangles import euler2mat
from PIL import Image
from scans import SMALL, head, image, nifti_gz, read

from app.jobs.blobs import BlobStore
from app.jobs.cards import CARD, ModelShelf
from app.jobs.connection import connect
from app.jobs.record import InputFile, Job, JobState, new_id
from app.jobs.store import JobOverError, JobStore
from models.checkpoint import Checkpoint
from models.predictor import Predictor
from worker import results
from worker.checkpoints import Checkpoints
from worker.task import Desk, run

pytestmark = pytest.mark.usefixtures("one_thread")

REGIONS = ("WT", "TC", "ET")


@pytest.fixture
def desk(settings, tiny):
    shutil.copytree(tiny, settings.models / "tiny")
    client = connect(settings)
    blobs = BlobStore(settings.store)
    blobs.open()
    jobs = JobStore(client, settings)
    checkpoints = Checkpoints(ModelShelf(settings.models), "cpu", settings.overlap, settings.precision)
    yield Desk(settings, jobs, jobs, blobs, checkpoints)
    client.close()


def oblique(spacing=1.0):
    """An affine that is no permutation, of a small angle."""
    turn = euler2mat(0.1, -0.05, 0.08) @ np.diag([-spacing, spacing, 1.0])
    return nib.affines.from_matvec(turn, [11, -7, 3])


def scanned(affine=None, modality="t2"):
    """A small scan whose header names somebody, as a store that knows no scrubbing would have it."""
    scan = image(head(modality, SMALL), oblique() if affine is None else affine)
    scan.header["descrip"] = b"DOE^JANE"
    scan.header["aux_file"] = b"DOE^JANE"
    scan.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JANE"))
    return nifti_gz(scan)


def add(desk, probabilities=True, grid="", **files):
    job_id = new_id()
    folder = desk.blobs.incoming(job_id)
    names = {name: f"{name}.zip" if data.startswith(b"PK") else f"{name}.nii.gz" for name, data in files.items()}
    for name, data in files.items():
        (folder / names[name]).write_bytes(data)
    desk.blobs.accept(job_id)
    inputs = tuple(InputFile(modality=n, filename=filename) for n, filename in names.items())
    job = Job(id=job_id, model="tiny", inputs=inputs, probabilities=probabilities, grid=grid)
    desk.jobs.create(job)
    return job


def done(desk, **files):
    job = add(desk, **files)
    run(job.id, desk, "w@here")
    job = desk.jobs.get(job.id)
    assert job.state is JobState.SUCCEEDED, job
    return job


def geometry(scan):
    header = scan.header
    codes = (int(header["qform_code"]), int(header["sform_code"]))
    return scan.shape, codes, scan.affine.tolist(), header.get_qform().tolist(), header["pixdim"].tolist()


@pytest.mark.parametrize("spacing", [1.0, 1.3])
def test_all_there_is_to_be_had(desk, tiny, spacing):
    """At the model's own spacing (1 mm), where all comes back exactly, and resampled."""
    job = done(desk, t2=scanned(oblique(spacing)), flair=scanned(oblique(spacing), "flair"))
    mask = read(desk.blobs.mask(job).read_bytes())
    values = np.asarray(mask.dataobj)

    assert job.probability_regions == REGIONS
    files = [desk.blobs.probability(job, place) for place in range(3)]
    images = [read(path.read_bytes()) for path in files]
    assert [geometry(i) for i in images] == [geometry(mask)] * 3
    assert {i.get_data_dtype() for i in images} == {np.dtype(np.uint8)}
    whole, core, enhancing = (i.get_fdata() for i in images)
    assert 0 <= whole.min() <= whole.max() <= 1
    assert (whole >= core - 1e-6).all()
    assert (core >= enhancing - 1e-6).all()
    rounding = 1 / 255
    # What is more probable than all else together wins, and what wins is not beaten by any one of the others.
    assert np.isin(values[enhancing > 0.5 + rounding], 4).all()
    assert (values[whole < 0.5 - rounding] == 0).all()
    assert (whole[values == 0] < 0.75 + rounding).all()
    assert (enhancing[values == 4] > 0.25 - rounding).all()

    predictor = Predictor(Checkpoint.load(tiny))
    found = predictor.segment(desk.blobs.inputs(job), probabilities=True).probabilities
    for region, held in zip(REGIONS, (whole, core, enhancing), strict=True):
        np.testing.assert_allclose(held, found.of(region), atol=rounding / 2 + 1e-6)

    assert job.previewed
    with Image.open(io.BytesIO(desk.blobs.preview(job).read_bytes())) as picture:
        assert picture.format == "PNG"
        rgb = np.asarray(picture.convert("RGB")).astype(int)
    assert (np.ptp(rgb, axis=-1) > 20).any() == bool(values.any())

    origin = job.origin
    assert origin.software.keys() >= {"passion-seg", "torch", "nibabel", "python"}
    assert origin.card_sha256 == hashlib.sha256((desk.settings.models / "tiny" / CARD).read_bytes()).hexdigest()
    assert (origin.backbone, origin.task) == ("rfnet", "glioma")
    assert origin.regions == {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
    assert origin.grid.shape == SMALL
    assert origin.grid.spacing_mm == pytest.approx((spacing, spacing, 1), rel=1e-5)
    assert origin.grid.axes == "LAS"
    assert origin.grid.voxel_ml == pytest.approx(spacing**2 / 1000, rel=1e-5)
    assert "saving" in job.seconds

    outputs = list(desk.blobs.mask(job).parent.iterdir())
    assert len(outputs) == 5
    for path in outputs:
        data = path.read_bytes()
        assert b"DOE" not in (gzip.decompress(data) if path.suffix == ".gz" else data)
    assert "DOE" not in job.model_dump_json()


def test_what_was_not_asked_for_is_not_kept(desk):
    job = done(desk, probabilities=False, t2=scanned())
    assert job.probability_regions == ()
    assert len(list(desk.blobs.mask(job).parent.iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "left"),
    [("save_preview", {"previewed"}), ("cautions", set()), ("software_versions", {"origin"}), ("Facts", set())],
)
def test_what_cannot_be_made_is_left_out_and_said(desk, monkeypatch, caplog, capsys, name, left):
    """A broken part, in the place of the one that works: the mask and all else are as ever."""

    def broken(*_):
        raise ZeroDivisionError("DOE^JANE")

    monkeypatch.setattr(results, name, type("Broken", (), {"of": broken}) if name == "Facts" else broken)
    results._versions.cache_clear()
    job = done(desk, t2=scanned())
    missing = {n for n in ("origin", "previewed", "probability_regions") if not getattr(job, n)}
    assert missing == left
    assert any("could not be made" in text for text in job.warnings)
    told = capsys.readouterr()
    assert "DOE" not in caplog.text + told.out + told.err + job.model_dump_json()
    assert read(desk.blobs.mask(job).read_bytes()).shape == SMALL


def test_probabilities_that_find_no_room_are_left_out(desk):
    job = add(desk, t2=scanned())

    class Cramped(BlobStore):
        """The second region's file finds a folder in its place."""

        def probability(self, job, place):
            path = super().probability(job, place)
            if place == 1:
                path.mkdir(exist_ok=True)
            return path

    cramped = Desk(desk.settings, desk.jobs, desk.signs, Cramped(desk.settings.store), desk.checkpoints)
    run(job.id, cramped, "w@here")
    after = desk.jobs.get(job.id)
    assert (after.state, after.probability_regions, after.previewed) == (JobState.SUCCEEDED, (), True)
    assert any(text.startswith("Probabilities could not be made") for text in after.warnings)
    assert not list(desk.blobs.mask(after).parent.glob("probability-[02]*"))


def test_a_run_that_came_to_nothing_leaves_none_of_its_files_and_all_of_the_others(desk):
    job = add(desk, t2=scanned())
    lost = desk.jobs.begin(job.id, "w@here")
    desk.jobs.process_ended(job.id, "w@here")
    run(job.id, desk, "w@here")
    after = desk.jobs.get(job.id)
    kept = sorted(desk.blobs.mask(after).parent.iterdir())
    for path in (desk.blobs.mask(lost), desk.blobs.preview(lost), desk.blobs.probability(lost, 1)):
        path.write_bytes(b"what the lost one found")
    with pytest.raises(JobOverError):
        desk.jobs.succeed(lost, {}, "")
    desk.blobs.discard_results(lost)
    assert sorted(desk.blobs.mask(after).parent.iterdir()) == kept
    assert len(kept) == 5


def test_coarse_images_and_unmeasured_modalities_are_said_in_the_record(desk):
    job = done(desk, probabilities=False, t2=scanned(np.diag([1.0, 1.0, 2.5, 1.0])))
    assert [text.split(" ", 3)[:3] for text in job.warnings] == [["t2", "has", "voxels"], ["How", "well", "the"]]


def sent_as_dicom():
    """A series at the model's own spacing, oblique, and a NIfTI scan of the same grid."""
    affine = lps(spacing=(1.0, 1.0, 1.0))
    flair, t2 = (head(name, SMALL).astype(np.uint16) for name in ("flair", "t2"))
    return zipped(series(flair, affine)[::-1]), nifti_gz(image(t2, ras(affine)))


def test_a_mask_on_a_dicom_series_grid_comes_as_dicom_seg_too(desk):
    """The two are the same voxel for voxel, in the patient's space."""
    flair, t2 = sent_as_dicom()
    job = done(desk, probabilities=False, t2=t2, flair=flair, grid="flair")
    assert job.dicom_seg
    mask = read(desk.blobs.mask(job).read_bytes())
    values = np.asarray(mask.dataobj)
    assert values.any()
    np.testing.assert_allclose(mask.affine, ras(lps(spacing=(1.0, 1.0, 1.0))), atol=1e-4)
    assert b"DOE" not in gzip.decompress(desk.blobs.mask(job).read_bytes())
    seg = hd.seg.segread(desk.blobs.dicom_seg(job))
    names = {label.name: label.value for label in Checkpoint.load(desk.settings.models / "tiny").card.task.labels}
    labels = [names[seg.get_segment_description(n).SegmentLabel] for n in seg.segment_numbers]
    assert labels == sorted(set(np.unique(values).tolist()) - {0})
    volume = seg.get_volume(combine_segments=True)
    places = np.argwhere(volume.array)
    voxels = np.c_[places, np.ones(len(places))] @ ras(volume.affine).T @ np.linalg.inv(mask.affine).T
    found = np.zeros_like(values)
    found[tuple(np.rint(voxels[:, :3]).astype(int).T)] = np.take([0, *labels], volume.array[tuple(places.T)])
    np.testing.assert_array_equal(found, values)


def test_a_dicom_seg_that_cannot_be_made_is_left_out_and_said(desk, monkeypatch):
    flair, t2 = sent_as_dicom()

    def broken(*_):
        raise ZeroDivisionError("DOE^JANE")

    with monkeypatch.context() as patch:
        patch.setattr("models.dicom_seg.save_dicom_seg", broken)
        job = done(desk, probabilities=False, flair=flair)
    assert not job.dicom_seg
    assert any(text.startswith("A DICOM SEG could not be made") for text in job.warnings)
    assert read(desk.blobs.mask(job).read_bytes()).shape == SMALL
    job = done(desk, probabilities=False, t2=t2, flair=flair)
    assert not job.dicom_seg, "the mask lies on a NIfTI file's grid"
    assert not any("DICOM" in text for text in job.warnings)
