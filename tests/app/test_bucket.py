"""The store in a bucket, with a real S3 server."""

import os
import time
from pathlib import Path

import httpx
import pytest
from boto3 import client as s3_client
from pydantic import ValidationError
from s3_server import BUCKET, s3_server

from app.jobs.blobs import BlobStore
from app.jobs.bucket import Bucket, StoreAwayError
from app.jobs.bucket_store import BucketStore, blobs_of
from app.jobs.connection import connect
from app.jobs.record import InputFile, Job, new_id
from app.jobs.settings import Settings
from app.jobs.store import JobStore
from app.jobs.sweeper import Sweeper

URL = f"s3://{BUCKET}/passion/jobs"
MIB = 1 << 20


@pytest.fixture(scope="module")
def server():
    with s3_server() as server:
        yield server


@pytest.fixture
def bucket(server):
    bucket = Bucket(URL, part=5 * MIB)
    yield bucket
    bucket.delete(list(bucket.objects()))


def machine(folder, bucket):
    """What one machine has: a bench of its own."""
    store = BucketStore(BlobStore(folder), bucket, benched=3600)
    store.open()
    return store


def new_job(**of):
    inputs = (InputFile(modality="t2", filename="t2.nii.gz"), InputFile(modality="flair", filename="flair.zip"))
    return Job(id=new_id(), model="m", run="r1", inputs=inputs, **of)


def upload(store, job):
    folder = store.incoming(job.id)
    for item in job.inputs:
        (folder / item.filename).write_bytes(item.modality.encode())


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_from_one_machine_to_another_and_back(bucket, tmp_path):
    api, worker, other_api = (machine(tmp_path / name, bucket) for name in ("api", "worker", "other"))
    job = new_job()
    upload(api, job)
    assert bucket.objects() == {}
    api.accept(job.id)
    assert sorted(bucket.objects()) == [f"{job.id}/input/{name}" for name in ("flair.zip", "t2.nii.gz")]
    assert files(tmp_path / "api") == []

    assert {name: path.read_bytes() for name, path in worker.inputs(job).items()} == {"t2": b"t2", "flair": b"flair"}
    results = (worker.mask(job), worker.preview(job), worker.dicom_seg(job), worker.probability(job, 1))
    for path in results:
        path.write_bytes(path.name.encode())
    worker.mask(job.model_copy(update={"run": "r0"})).write_bytes(b"another run's")
    worker.keep(job)
    worker.leave(job)
    assert files(tmp_path / "worker") == []

    for path in (other_api.mask(job), other_api.preview(job), other_api.dicom_seg(job), other_api.probability(job, 1)):
        reading = other_api.read(path)
        assert reading.path.read_bytes() == path.name.encode()
        assert reading.temporary
        reading.path.unlink()
    with pytest.raises(FileNotFoundError):
        other_api.read(other_api.probability(job, 2))
    assert files(tmp_path / "other") == []

    other_api.delete(job.id)
    other_api.delete(job.id)
    assert bucket.objects() == {}


def test_a_run_that_came_to_nothing_leaves_the_others_results(bucket, tmp_path):
    worker = machine(tmp_path, bucket)
    runs = [new_job()]
    runs.append(runs[0].model_copy(update={"run": "r2"}))
    upload(worker, runs[0])
    worker.accept(runs[0].id)
    for job in runs:
        worker.inputs(job)
        worker.mask(job).write_bytes(b"mask")
        worker.keep(job)
    worker.discard_results(runs[0])
    assert [key for key in bucket.objects() if "output" in key] == [f"{runs[0].id}/output/mask-r2.nii.gz"]


def test_a_link_is_good_for_a_while_and_for_one_file(bucket, tmp_path):
    store = machine(tmp_path, bucket)
    job = new_job()
    store.inputs(job.model_copy(update={"inputs": ()}))
    store.mask(job).write_bytes(b"mask")
    store.keep(job)
    link = store.link(store.mask(job), 60, "application/gzip", "a-mask.nii.gz")
    answer = httpx.get(link)
    assert (answer.status_code, answer.content) == (200, b"mask")
    assert "secret-of-the-store" not in link
    with pytest.raises(FileNotFoundError):
        store.link(store.preview(job), 60, "image/png", None)


def test_what_is_large_goes_in_parts_and_comes_back_whole(bucket, tmp_path):
    data = os.urandom(12 * MIB)
    (tmp_path / "large").write_bytes(data)
    bucket.put(tmp_path / "large", "job/input/large")
    head = s3_client("s3").head_object(Bucket=BUCKET, Key="passion/jobs/job/input/large")
    assert head["ETag"].strip('"').endswith("-3"), "it was sent in one piece"
    bucket.get("job/input/large", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "large"]


def test_what_was_never_sent_to_its_end_and_what_has_no_record_is_swept(bucket, settings, tmp_path):
    """As a killed API leaves it: parts of an object, objects without a record, an incoming folder."""
    plain = s3_client("s3")
    begun = plain.create_multipart_upload(Bucket=BUCKET, Key=f"passion/jobs/{new_id()}/input/t2.nii.gz")
    others = plain.create_multipart_upload(Bucket=BUCKET, Key="passion/jobs/film")
    for key in ("passion/jobs/README", "passion/jobs/films/1", "other/2"):
        plain.put_object(Bucket=BUCKET, Key=key, Body=b"not ours")
    part = {"Bucket": BUCKET, "Key": begun["Key"], "UploadId": begun["UploadId"], "PartNumber": 1}
    plain.upload_part(**part, Body=b"x" * 5 * MIB)
    api = machine(tmp_path / "api", bucket)
    kept, orphan, half = new_job(), new_job(), new_job()
    for job in (kept, orphan, half):
        upload(api, job)
    api.accept(kept.id)
    api.accept(orphan.id)
    client = connect(settings)
    JobStore(client, settings).create(kept)
    time.sleep(0.3)
    now = settings.model_copy(update={"orphans_kept": 0.1})
    Sweeper(client, now, api).round()
    client.close()
    assert {key.partition("/")[0] for key in bucket.objects()} == {kept.id, "README", "films"}
    assert files(tmp_path / "api") == []
    left = plain.list_multipart_uploads(Bucket=BUCKET)["Uploads"]
    assert [upload["UploadId"] for upload in left] == [others["UploadId"]]


def test_a_refused_upload_asks_nothing_of_the_bucket(tmp_path):
    store = machine(tmp_path, Bucket("s3://nowhere"))
    upload(store, job := new_job())
    store.refuse(job.id)
    assert files(tmp_path) == []


def test_a_store_that_is_away_is_an_error_that_names_nothing(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    away = Bucket(URL, pauses=(0.01,))
    (tmp_path / "t2").write_bytes(b"x")
    for action in (
        away.ping,
        lambda: away.put(tmp_path / "t2", "job/input/t2"),
        lambda: away.get("job/input/t2", tmp_path / "other"),
        lambda: away.delete(["job/input/t2"]),
    ):
        with pytest.raises(StoreAwayError) as caught:
            action()
        assert str(caught.value) == "the store does not answer as it should"
    monkeypatch.undo()
    with pytest.raises(StoreAwayError):
        Bucket("s3://no-such-bucket").ping()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t2"]


def test_the_settings_choose(tmp_path):
    assert isinstance(blobs_of(Settings(store=tmp_path)), BlobStore)
    assert isinstance(blobs_of(Settings(store=tmp_path, bucket=URL)), BucketStore)
    for wrong in ("scans", "s3://", "https://scans.example", "s3://scans/../x y"):
        with pytest.raises(ValidationError):
            Settings(bucket=wrong)


def test_the_bench_is_cleared_of_what_was_left(bucket, tmp_path):
    store = BucketStore(BlobStore(tmp_path), bucket, benched=0.1)
    left, job = new_job(), new_job()
    (tmp_path / left.id / "output").mkdir(parents=True)
    time.sleep(0.2)
    store.inputs(job.model_copy(update={"inputs": ()}))
    assert [path.name for path in Path(tmp_path).iterdir()] == [job.id]
