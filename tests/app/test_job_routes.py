"""Own jobs, repeated requests, limits and events over HTTP, with a real Redis and no worker."""

import json
import shutil
import threading

import httpx
import pytest
from scans import scan
from serving import serving

from app.jobs.blobs import BlobStore
from app.jobs.connection import connect
from app.jobs.keys import KeyStore
from app.jobs.record import MaskGrid, Origin
from app.jobs.store import JobStore
from benchmarks.parts import until

FLAIR, T2 = scan("flair"), scan("t2")
RESULTS = ("report", "preview.png", "dicom-seg", "probabilities", "probabilities/WT")
ORIGIN = Origin(
    software={"torch": "2"},
    trained_with={"torch": "1"},
    card_sha256="c" * 64,
    backbone="rfnet",
    task="glioma",
    regions={"WT": (1, 2, 4), "A/B": (1,)},
    grid=MaskGrid(shape=(4, 5, 6), spacing_mm=(1, 1, 2), axes="LPS", voxel_ml=0.002),
)


@pytest.fixture
def client(settings, tiny):
    shutil.copytree(tiny, settings.models / "tiny")
    client = connect(settings)
    yield client
    client.close()


def post(api, data=FLAIR, key=None, **fields):
    headers = {"Idempotency-Key": key} if key else {}
    return api.post("/segment", files={"flair": data, **fields}, headers=headers)


def kind(response):
    assert response.headers["content-type"] == "application/problem+json", response.text
    return response.status_code, response.json()["type"].removeprefix("/problems/")


def test_a_key_sees_its_own_jobs_only(settings, client):
    guarded = settings.model_copy(update={"auth": "on"})
    keys = KeyStore(client)
    with serving(guarded, keys.create("one")[1]) as api:
        other = {"Authorization": f"Bearer {keys.create('two')[1]}"}
        job = post(api).json()
        assert api.get(job["links"]["self"]).json() == job
        hidden = [
            ("GET", f"/jobs/{job['id']}"),
            *(("GET", f"/jobs/{job['id']}/{result}") for result in ("mask", *RESULTS)),
            ("GET", f"/jobs/{job['id']}/events"),
            ("DELETE", f"/jobs/{job['id']}"),
        ]
        never = "00000000-0000-4000-8000-000000000000"
        for method, path in hidden:
            answer = api.request(method, path, headers=other)
            assert kind(answer) == (404, "unknown-job")
            unknown = api.request(method, path.replace(job["id"], never), headers=other)
            assert answer.content == unknown.content, "it can be told from a job that never was"
        assert api.get("/jobs", headers=other).json()["jobs"] == []
        assert [j["id"] for j in api.get("/jobs").json()["jobs"]] == [job["id"]]
        assert api.delete(f"/jobs/{job['id']}").status_code == 204


def test_pages(settings, client):
    with serving(settings) as api:
        ids = [post(api).json()["id"] for _ in range(3)]
        first = api.get("/jobs", params={"limit": 2}).json()
        second = api.get(first["next"]).json()
        assert [j["id"] for j in first["jobs"] + second["jobs"]] == ids[::-1]
        assert second["next"] is None
        assert [j["position"] for j in first["jobs"]] == [3, 2]
        for query in ("limit=0", "limit=201", "limit=x", "before=-1", f"before={2**60}"):
            assert kind(api.get(f"/jobs?{query}")) == (422, "invalid-request"), query


def test_a_request_that_is_repeated_is_the_same_job(settings, client):
    with serving(settings) as api:
        first = post(api, key="a", t2=T2)
        again = post(api, key="a", t2=T2)
        assert (first.status_code, again.status_code) == (202, 202)
        assert first.json() == again.json()
        assert first.headers["location"] == again.headers["location"]
        assert [p.name for p in settings.store.iterdir()] == [first.json()["id"]]
        named = api.post(
            "/segment", files={"flair": FLAIR, "t2": T2}, data={"model": "tiny"}, headers={"Idempotency-Key": "a"}
        )
        assert named.json() == first.json(), "the default model by its name"
        for other in ({"data": T2, "t2": FLAIR}, {}, {"data": T2}):
            assert kind(post(api, key="a", **other)) == (422, "idempotency-key-reused")
        assert post(api, key="b").json()["id"] != first.json()["id"]
        for bad in ("x" * 256, "é".encode(), ""):
            answer = api.post("/segment", files={"flair": FLAIR}, headers={"Idempotency-Key": bad})
            assert kind(answer) == (422, "bad-idempotency-key"), bad
        assert len(list(settings.store.iterdir())) == 2
        api.delete(first.json()["links"]["self"])
        assert post(api, key="a", t2=T2).json()["state"] == "cancelled"
        assert "a" not in {k for k in client.keys("*") if ":a" in k}, "the key itself is not kept"


def test_full_is_said_before_the_upload_and_after_it(settings, client):
    small = settings.model_copy(update={"queue_limit": 2, "jobs_per_key": 1, "auth": "on"})
    keys = KeyStore(client)
    one, two, three = ({"Authorization": f"Bearer {keys.create(n)[1]}"} for n in ("one", "two", "three"))
    with serving(small) as api:
        api.headers.update(one)
        first = post(api, key="x")
        assert first.status_code == 202
        refused = post(api)
        assert kind(refused) == (429, "too-many-jobs")
        assert refused.headers["retry-after"] == "10"
        assert kind(post(api, key="y")) == (429, "too-many-jobs")
        assert post(api, key="x").json() == first.json()
        api.headers.update(two)
        assert post(api).status_code == 202
        api.headers.update(three)
        for key in (None, "z"):
            refused = post(api, key=key)
            assert kind(refused) == (503, "queue-full")
            assert refused.headers["retry-after"] == "30"
        assert len(list(small.store.iterdir())) == 2
        api.headers.update(one)
        api.delete(first.json()["links"]["self"])
        assert post(api).status_code == 202


def test_what_there_is_beside_the_mask(settings, client):
    store, blobs = JobStore(client, settings), BlobStore(settings.store)
    with serving(settings) as api:
        form = {"model": "tiny", "probabilities": "true", "et_value": "4"}
        job = api.post("/segment", files={"flair": FLAIR}, data=form).json()
        here = job["links"]["self"]
        assert [job["links"][name] for name in ("report", "preview", "probabilities")] == [None] * 3
        for result in RESULTS:
            assert kind(api.get(f"{here}/{result}")) == (409, "not-done")
        run = store.begin(job["id"], "w")
        blobs.preview(run).write_bytes(b"a picture")
        blobs.probability(run, 0).write_bytes(b"of WT")
        volumes = {"WT": 1.5, "A/B": 0.5}
        said = {"seconds": {"saving": 0.1}, "warnings": ["beware"]}
        store.succeed(run, volumes, "f" * 64, origin=ORIGIN, previewed=True, probability_regions=("WT", "A"), **said)
        links = api.get(here).json()["links"]
        answer = api.get(links["report"])
        assert answer.headers["cache-control"] == "no-store"
        report = answer.json()
        assert (report["weights_sha256"], report["card_sha256"]) == ("f" * 64, "c" * 64)
        assert report["software"] == {"worker": {"torch": "2"}, "model": {"torch": "1"}}
        assert report["modalities"] == {"given": ["flair"], "missing": ["t1ce", "t1", "t2"]}
        assert report["grid"] == {"shape": [4, 5, 6], "spacing_mm": [1, 1, 2], "axes": "LPS", "voxel_ml": 0.002}
        assert report["regions"][0] == {"name": "WT", "values": [1, 2, 4], "volume_ml": 1.5, "expected_dice": 0.5}
        assert (report["seconds"], report["warnings"], report["attempts"]) == ({"saving": 0.1}, ["beware"], 1)
        assert (report["expected_on"], report["links"]) == ("nothing but noise", links)
        assert {label["value"] for label in report["labels"]} == {0, 1, 2, 4}
        assert "not a medical device" in report["notice"]
        picture = api.get(links["preview"])
        assert (picture.content, picture.headers["content-type"]) == (b"a picture", "image/png")
        listed = api.get(links["probabilities"]).json()["regions"]
        assert [r["region"] for r in listed] == ["WT", "A"]
        probability = api.get(listed[0]["href"])
        assert (probability.content, probability.headers["content-type"]) == (b"of WT", "application/gzip")
        for answer in (picture, probability):
            assert answer.headers["cache-control"] == "no-store"
            assert answer.headers["accept-ranges"] == "none"
        assert kind(api.get(listed[1]["href"])) == (410, "no-probabilities"), "the file is gone"
        assert kind(api.get(f"{here}/probabilities/ET")) == (404, "unknown-region")
        blobs.preview(run).unlink()
        assert kind(api.get(links["preview"])) == (410, "no-preview")


def test_what_there_is_not_beside_the_mask(settings, client):
    store = JobStore(client, settings)
    gone = [(410, "no-report"), (410, "no-preview"), (410, "no-dicom-seg"), *[(410, "no-probabilities")] * 2]
    with serving(settings) as api:
        for asked in ("true", "false"):
            job = api.post("/segment", files={"flair": FLAIR}, data={"probabilities": asked}).json()
            here = job["links"]["self"]
            store.succeed(store.begin(job["id"], "w"), {"WT": 1.0}, "")
            links = api.get(here).json()["links"]
            assert [links[name] for name in ("report", "preview", "probabilities")] == [None] * 3
            assert [kind(api.get(f"{here}/{result}")) for result in RESULTS] == gone
            assert "flair, which was sent as NIfTI" in api.get(f"{here}/dicom-seg").json()["detail"]
            remedy = api.get(f"{here}/probabilities").json()["remedy"]
            assert ("probabilities=true" in remedy) == (asked == "false")
        here = post(api).json()["links"]["self"]
        api.delete(here)
        assert [kind(api.get(f"{here}/{result}")) for result in RESULTS] == gone


def test_probabilities_are_asked_for_in_one_word(settings, client):
    store = JobStore(client, settings)
    with serving(settings) as api:

        def send(*said, key=None):
            fields = [("probabilities", (None, word)) for word in said]
            headers = {"Idempotency-Key": key} if key else {}
            return api.post("/segment", files=[*fields, ("flair", ("x", FLAIR))], headers=headers)

        for said in (("yes",), ("",), ("True",), ("true", "true"), ("t" * 5000,)):
            refused = send(*said)
            assert kind(refused) == (422, "invalid-request"), said
            assert refused.json()["field"] == "probabilities"
        assert [store.get(send(*said).json()["id"]).probabilities for said in ((), ("false",), ("true",))] == [
            False,
            False,
            True,
        ]
        first = send("false", key="a").json()
        assert send(key="a").json() == first, "false is what is asked for by nothing"
        assert kind(send("true", key="a")) == (422, "idempotency-key-reused")


def events(api, path, seen):
    with api.stream("GET", path) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("data:"):
                seen.append(json.loads(line.removeprefix("data:")))


def test_events_tell_each_change_until_the_end(settings, client):
    store = JobStore(client, settings)
    with serving(settings.model_copy(update={"streams": 1})) as api:
        job, seen = post(api).json(), []
        reader = threading.Thread(target=events, args=(api, job["links"]["events"], seen))
        reader.start()
        until(lambda: seen)
        assert seen[0] == api.get(job["links"]["self"]).json()
        assert kind(api.get(job["links"]["events"])) == (503, "too-many-streams")
        run = store.begin(job["id"], "w")
        until(lambda: seen[-1]["stage"] == "starting")
        store.progress(run, "segmenting", 50.0)
        until(lambda: seen[-1]["percent"] == 50.0)
        store.succeed(run, {"WT": 1.0}, "")
        reader.join(5)
        assert not reader.is_alive()
        assert [e["state"] for e in seen] == ["queued", "running", "running", "succeeded"]
        assert seen[-1] == api.get(job["links"]["self"]).json()
        again = []
        events(api, job["links"]["events"], again)
        assert again == seen[-1:], "one that is over is told once"


def test_a_reader_who_leaves_gives_up_the_place(settings, client):
    with serving(settings.model_copy(update={"streams": 1})) as api:
        job = post(api).json()
        for _ in range(2):
            with (
                httpx.Client(base_url=api.base_url) as another,
                another.stream("GET", job["links"]["events"]) as stream,
            ):
                until(lambda stream=stream: stream.status_code == 200 or None)
            until(lambda: "event_streams 0.0" in api.get("/metrics").text)
