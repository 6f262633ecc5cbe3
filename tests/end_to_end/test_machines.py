"""Two APIs and two workers, each with a disk of its own as on four machines, one Redis, and one bucket."""

import gzip

import httpx
import pytest
import s3_server
from scans import SMALL, read, scan

from app.client import Client, ClientError
from app.jobs.bucket import Bucket
from benchmarks.parts import Parts, until

pytestmark = pytest.mark.slow

URL = f"s3://{s3_server.BUCKET}/jobs"
LONG, SHORT = scan("t2", (48, 48, 48)), scan("t2", SMALL)


@pytest.fixture
def server():
    with s3_server.s3_server() as server:
        yield server


@pytest.fixture
def parts(server, tmp_path, models):
    with Parts(tmp_path, models, bucket=URL, lease=2.0) as parts:
        parts.start_redis()
        parts.start_api()
        for name in ("worker-1", "worker-2"):
            parts.start_worker(store=tmp_path / name)
        parts.ready(2)
        yield parts


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_job_is_sent_to_one_done_by_others_and_fetched_from_another(parts, server, tmp_path):
    elsewhere = parts.start_another_api(store=tmp_path / "api-2", link_seconds=60)
    bucket = Bucket(URL)

    job = parts.post({"t2": LONG}).json()
    parts.running(job)
    parts.kill_worker(parts.worker_of(job))  # its disk is lost with it
    done = parts.finished(job)
    assert (done["state"], done["attempts"]) == ("succeeded", 2)
    mask = parts.http.get(done["links"]["mask"])
    assert mask.headers["content-type"] == "application/gzip"
    assert read(mask.content).shape == (48, 48, 48)

    with httpx.Client(base_url=elsewhere) as other:
        assert other.get(done["links"]["self"]).json() == done
        link = other.get(done["links"]["mask"])
        assert link.status_code == 307
        assert link.headers["cache-control"] == "no-store"
        assert httpx.get(link.headers["location"]).content == mask.content
    with Client(elsewhere) as client:
        client.fetch(done["links"]["mask"], tmp_path / "mask.nii")
        assert (tmp_path / "mask.nii").read_bytes() == gzip.decompress(mask.content)
        client.fetch(done["links"]["preview"], tmp_path / "preview.png")
        client.delete(done)
        with pytest.raises(ClientError, match="no job has this id"):
            client.fetch(done["links"]["mask"], tmp_path / "again.nii")
    assert bucket.objects() == {}

    server.stop()
    assert (parts.post({"t2": SHORT}).status_code, parts.http.get("/readyz").status_code) == (503, 503)
    again = s3_server.start(server.get_host_and_port()[1])
    try:
        later = parts.finished(parts.post({"t2": SHORT}).json())
        assert later["state"] == "succeeded"
        assert parts.http.get(later["links"]["mask"]).status_code == 200
        assert {key.partition("/")[0] for key in bucket.objects()} == {later["id"]}
        assert parts.http.get("/readyz").status_code == 200
    finally:
        again.stop()
    living = {w.pid: w for w in parts.workers}
    assert len(living) == 1
    until(lambda: files(tmp_path / "store") == [], what="the API keeps files")
    kept = [name for name in ("worker-1", "worker-2") if files(tmp_path / name)]
    assert len(kept) <= 1, "a worker that lives keeps files"
    assert "secret-of-the-store" not in parts.log()
