"""A model of another task is served by its checkpoint alone: hearts in thick slices, label values above 255."""

import gzip

import nibabel as nib
import numpy as np
import pytest
import tiny_checkpoint
from scans import read
from small_organs import HEART, HEART_ZOOMS, heart

from app.jobs.blobs import BlobStore
from app.jobs.cards import ModelShelf
from app.jobs.connection import connect
from app.jobs.record import InputFile, Job, JobState, new_id
from app.jobs.scan import check
from app.jobs.store import JobStore
from models.checkpoint import Checkpoint, save_checkpoint
from worker.checkpoints import Checkpoints
from worker.task import Desk, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def desk(settings):
    folder = tiny_checkpoint.make(settings.models / "heart", task=HEART)
    loaded = Checkpoint.load(folder)
    head = loaded.network.decoder_fuse.seg_layer
    head.weight.data.zero_()
    head.bias.data[:] = 0
    head.bias.data[5] = 9  # scar, everywhere
    save_checkpoint(folder, loaded.card, loaded.network)
    client = connect(settings)
    blobs = BlobStore(settings.store)
    blobs.open()
    shelf = ModelShelf(settings.models)
    jobs, checkpoints = JobStore(client, settings), Checkpoints(shelf, "cpu", settings.overlap, settings.precision)
    yield Desk(settings, jobs, jobs, blobs, checkpoints)
    client.close()


def stack(slices: int, between: float) -> bytes:
    """A gzipped short-axis LGE stack."""
    image = nib.Nifti1Image(heart(0)[1]["lge"][..., :slices], np.diag([*HEART_ZOOMS[:2], between, 1]))
    return gzip.compress(image.to_bytes())


@pytest.mark.parametrize(("slices", "between"), [(5, 15.0), (2, 23.0)])
def test_a_mask_with_2221(desk, slices, between):
    job_id = new_id()
    path = desk.blobs.incoming(job_id) / "lge.nii.gz"
    path.write_bytes(stack(slices, between))
    # The API's default limits let it in.
    assert check(path, path.with_name("clean"), desk.settings).shape == (48, 48, slices)
    desk.blobs.accept(job_id)
    desk.jobs.create(Job(id=job_id, model="heart", inputs=(InputFile(modality="lge", filename="lge.nii.gz"),)))
    run(job_id, desk, "w@here")
    done = desk.jobs.get(job_id)
    assert (done.state, done.error) == (JobState.SUCCEEDED, None)
    mask = read(desk.blobs.mask(done).read_bytes())
    assert mask.get_data_dtype() == np.uint16
    assert mask.shape == (48, 48, slices)
    assert (np.asarray(mask.dataobj) == 2221).all()
    assert done.volumes_ml["scar"] == pytest.approx(48 * 48 * slices * 1.5 * 1.5 * between / 1000)
    assert done.volumes_ml["LV"] == 0


def test_the_card_tells_the_service_what_to_ask_for(desk):
    card = ModelShelf(desk.settings.models).get("heart")
    assert card.modalities == ("bssfp", "lge", "t2")
    assert (card.canonical("DE"), card.canonical("flair")) == ("lge", None)
    assert {label.value: label.name for label in card.task.labels}[2221] == "scar"
