import pytest

from app.jobs.blobs import BlobStore
from app.jobs.record import InputFile, Job


@pytest.fixture
def blobs(tmp_path):
    store = BlobStore(tmp_path / "deep" / "store")
    store.open()
    return store


def test_an_upload_is_no_job_until_it_is_accepted(blobs):
    folder = blobs.incoming("a")
    (folder / "t2.nii").write_bytes(b"x")
    assert [p.name for p in blobs.root.iterdir()] == [".incoming-a"]
    blobs.accept("a")
    assert [p.name for p in blobs.root.iterdir()] == ["a"]
    job = Job(id="a", model="m", inputs=(InputFile(modality="t2", filename="t2.nii"),))
    assert blobs.inputs(job)["t2"].read_bytes() == b"x"
    assert blobs.mask(job).parent.is_dir()


@pytest.mark.parametrize("accepted", [True, False])
def test_deleting_leaves_nothing(blobs, accepted):
    (blobs.incoming("a") / "t2.nii").write_bytes(b"x")
    if accepted:
        blobs.accept("a")
    blobs.delete("a")
    blobs.delete("a")
    assert list(blobs.root.iterdir()) == []


def test_inputs_keep_their_order(blobs):
    names = ("t2", "flair", "t1")
    job = Job(id="a", model="m", inputs=tuple(InputFile(modality=n, filename=f"{n}.nii.gz") for n in names))
    assert tuple(blobs.inputs(job)) == names


def test_only_this_user_may_look(blobs):
    blobs.incoming("a")
    assert blobs.root.stat().st_mode & 0o077 == 0
    assert (blobs.root / ".incoming-a" / "input").stat().st_mode & 0o077 == 0
