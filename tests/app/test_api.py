"""The API in this process, with a real Redis and no worker: what it refuses, what it keeps, what it says of itself."""

import json
import re
import shutil
import socket
from contextlib import suppress

import pytest
import redis
from own_redis import running
from scans import head, image, nifti, scan
from serving import serving

from app.jobs.connection import connect
from app.jobs.presence import Consumer, Presence
from app.web.problems import KINDS


@pytest.fixture
def served(settings, tiny):
    """Settings under which one model is served."""
    shutil.copytree(tiny, settings.models / "tiny")
    return settings


@pytest.fixture
def api(served):
    with serving(served) as client:
        yield client


def left(settings):
    """What there is on the store and in Redis that belongs to jobs."""
    client = connect(settings)
    keys = [k for k in client.keys("*") if k != "passion:sequence" and not k.startswith("_kombu")]
    client.close()
    return [p.name for p in settings.store.iterdir()] + keys


def assert_problem(response, kind, field=None):
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert document["type"] == f"/problems/{kind}", document
    assert document["status"] == response.status_code == KINDS[kind].status
    assert document["title"] == KINDS[kind].title
    assert document.get("field") == field
    assert "Traceback" not in response.text
    return document


def test_an_accepted_job(api, served):
    response = api.post("/segment", files={"t2w": scan("t2"), "flair": scan("flair")}, data={"model": "tiny"})
    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"] == f"/jobs/{job['id']}" == job["links"]["self"]
    assert (job["state"], job["position"], job["model"]) == ("queued", 1, "tiny")
    assert job["modalities"] == {"given": ["t2", "flair"], "missing": ["t1ce", "t1"]}
    assert job["expected_dice"] is None
    assert job["links"]["mask"] is None
    assert "not a medical device" in job["notice"]
    files = sorted(p.name for p in (served.store / job["id"] / "input").iterdir())
    assert files == ["flair.nii.gz", "t2.nii.gz"]
    assert api.get(job["links"]["self"]).json() == job
    second = api.post("/segment", files={"flair": nifti(image(head("flair")))}).json()
    assert second["position"] == 2
    assert second["expected_dice"] == {
        "dataset": "nothing but noise",
        "cases": 3,
        "dice": {"WT": 0.5, "TC": 0.25, "ET": None},
    }
    assert [p.name for p in (served.store / second["id"] / "input").iterdir()] == ["flair.nii.gz"]


def test_a_blank_choice_of_a_browser_is_no_file(api):
    boundary = "b"
    body = (
        b'--b\r\nContent-Disposition: form-data; name="t1"; filename=""\r\n\r\n\r\n'
        b'--b\r\nContent-Disposition: form-data; name="t2"; filename="x"\r\n\r\n' + scan("t2") + b"\r\n--b--\r\n"
    )
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    response = api.post("/segment", content=body, headers=headers)
    assert response.status_code == 202
    assert response.json()["modalities"]["given"] == ["t2"]


def test_the_model_may_stand_after_the_files(api):
    files = [("t1c", ("x", scan("t1ce"))), ("model", (None, "tiny"))]
    response = api.post("/segment", files=files)
    assert response.status_code == 202
    assert response.json()["modalities"]["given"] == ["t1ce"]


def limited(served, **limits):
    return serving(served.model_copy(update=limits))


@pytest.mark.parametrize(
    ("limits", "kind", "field"),
    [
        ({"max_file_bytes": 10_000}, "too-large", "flair"),
        ({"max_request_bytes": 10_000}, "too-large", None),
        ({"max_uncompressed_bytes": 100_000}, "too-large-uncompressed", "flair"),
        ({"max_voxels": 1000}, "too-many-voxels", "flair"),
        ({"min_axis": 33}, "too-few-voxels", "flair"),
        ({"min_spacing": 2.0}, "bad-spacing", "flair"),
    ],
)
def test_each_limit_is_the_settings(served, limits, kind, field):
    with limited(served, **limits) as api:
        assert_problem(api.post("/segment", files={"flair": scan()}), kind, field)
    assert left(served) == []


def test_a_body_without_length_is_counted_too(served):
    def endless():
        yield b'--b\r\nContent-Disposition: form-data; name="t2"; filename="x"\r\n\r\n\x1f\x8b'
        for _ in range(100):
            yield bytes(1000)

    headers = {"content-type": "multipart/form-data; boundary=b"}
    with limited(served, max_request_bytes=50_000) as api:
        assert_problem(api.post("/segment", content=endless(), headers=headers), "too-large")
    assert left(served) == []


def test_without_redis_nothing_is_taken(served, tmp_path):
    away = served.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    with serving(away) as api:
        assert_problem(api.post("/segment", files={"flair": scan()}), "unavailable")
        assert_problem(api.get("/jobs/some"), "unavailable")
        assert_problem(api.get("/readyz"), "unavailable")
        assert api.get("/livez").status_code == 200
    assert list(served.store.iterdir()) == []


def test_a_redis_that_dies_between_upload_and_queue(served, tmp_path):
    """It answers when asked and takes no more writes: the job is refused as a whole."""
    with running(tmp_path / "full") as url:
        full = served.model_copy(update={"redis_url": url})
        client = redis.Redis.from_url(url)
        client.config_set("maxmemory", 1)
        with serving(full) as api:
            response = api.post("/segment", files={"flair": scan()})
            assert_problem(response, "unavailable")
            assert response.headers["retry-after"]
        client.config_set("maxmemory", 0)
        assert client.keys("passion:job:*") == []
    assert list(served.store.iterdir()) == []


def test_two_models_and_no_default(served, tiny):
    shutil.copytree(tiny, served.models / "other")
    with serving(served) as api:
        document = assert_problem(api.post("/segment", files={"flair": scan()}), "model-not-chosen", "model")
        assert "other, tiny" in document["remedy"]
        assert api.post("/segment", files={"flair": scan()}, data={"model": "other"}).json()["model"] == "other"
    with limited(served, default_model="tiny") as api:
        assert api.post("/segment", files={"flair": scan()}).json()["model"] == "tiny"
        assert {m["name"]: m["default"] for m in api.get("/models").json()["models"]} == {"other": False, "tiny": True}


def test_a_model_of_other_modalities_is_served_without_a_line_of_code(served, tiny):
    """Nothing in the service knows of four modalities or of gliomas."""
    card = json.loads((tiny / "card.json").read_text())
    card["task"]["modalities"] = [
        {"name": "bssfp", "aliases": ["c0"], "description": "cine"},
        {"name": "lge", "aliases": ["de"], "description": "late gadolinium"},
    ]
    (served.models / "heart").mkdir()
    (served.models / "heart" / "card.json").write_text(json.dumps(card))
    with serving(served) as api:
        job = api.post("/segment", files={"de": scan("lge")}, data={"model": "heart"}).json()
        assert job["modalities"] == {"given": ["lge"], "missing": ["bssfp"]}
        refused = api.post("/segment", files={"flair": scan()}, data={"model": "heart"})
        assert "bssfp or c0; lge or de" in assert_problem(refused, "unknown-field", "flair")["remedy"]
        form = api.get("/openapi.json").json()["paths"]["/segment"]["post"]["requestBody"]["content"]
        assert {"model", "lge", "bssfp", "flair"} <= set(form["multipart/form-data"]["schema"]["properties"])


def test_a_broken_card(served):
    (served.models / "tiny" / "card.json").write_text("{}")
    with serving(served) as api:
        for response in (api.get("/models"), api.get("/models/tiny"), api.post("/segment", files={"flair": scan()})):
            document = assert_problem(response, "broken-model")
            assert str(served.models) not in document["detail"]
        assert api.get("/openapi.json").status_code == 200
    assert left(served) == []


def test_a_store_that_cannot_be_written_is_an_error_with_a_reference_and_no_story(served, capfd):
    with serving(served) as api:
        shutil.rmtree(served.store)
        served.store.write_text("a file where a folder should be")
        document = assert_problem(api.post("/segment", files={"flair": scan()}), "internal")
    assert re.fullmatch(r"[0-9a-f]{12}", document["reference"])
    assert str(served.store) not in json.dumps(document)
    log = capfd.readouterr().err
    assert document["reference"] in log
    assert "NotADirectoryError" in log
    assert str(served.store) not in log


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", "/nothing", "not-found"),
        ("GET", "/jobs/none", "unknown-job"),
        ("GET", "/jobs/none/mask", "unknown-job"),
        ("DELETE", "/jobs/none", "unknown-job"),
        ("GET", "/models/none", "not-found"),
        ("GET", "/problems/none", "not-found"),
        ("PUT", "/segment", "method-not-allowed"),
        ("GET", "/segment", "method-not-allowed"),
        ("POST", "/jobs/none", "method-not-allowed"),
    ],
)
def test_wrong_ways(api, method, path, kind):
    response = api.request(method, path)
    assert_problem(response, kind)
    allowed = {"/segment": "POST", "/jobs/none": "DELETE, GET"}
    assert response.headers.get("allow") == (allowed[path] if kind == "method-not-allowed" else None)


def test_deleting_a_queued_job(api, served):
    job = api.post("/segment", files={"flair": scan()}).json()
    later = api.post("/segment", files={"flair": scan()}).json()
    assert_problem(api.get(f"/jobs/{job['id']}/mask"), "not-done")
    response = api.delete(f"/jobs/{job['id']}")
    assert (response.status_code, response.content) == (204, b"")
    assert not (served.store / job["id"]).exists()
    after = api.get(f"/jobs/{job['id']}").json()
    assert (after["state"], after["position"]) == ("cancelled", None)
    assert after["finished"]
    assert_problem(api.get(f"/jobs/{job['id']}/mask"), "no-mask")
    assert api.get(f"/jobs/{later['id']}").json()["position"] == 1
    assert api.delete(f"/jobs/{job['id']}").status_code == 204


def test_ready_means_a_worker_and_a_model(api, served):
    assert "no worker" in assert_problem(api.get("/readyz"), "unavailable")["detail"]
    client = connect(served)
    presence = Presence(client)
    worker = Consumer("w@host", 2)
    presence.renew(worker)
    ready = {"status": "ready", "workers": 1, "children": 2, "waiting": 0, "models": ["tiny"]}
    assert api.get("/readyz").json() == ready
    shutil.rmtree(served.models / "tiny")
    assert "no model" in assert_problem(api.get("/readyz"), "unavailable")["detail"]
    presence.leave(worker)
    assert presence.workers() == []
    client.close()


def test_a_worker_that_stops_renewing_is_gone(api, served):
    client = connect(served)
    client.zadd("passion:consuming", {"dead@host 1": 1.0})
    assert_problem(api.get("/readyz"), "unavailable")
    client.close()


def test_models(api):
    (model,) = api.get("/models").json()["models"]
    assert api.get("/models/tiny").json() == model
    assert model["default"] is True
    assert [m["name"] for m in model["modalities"]] == ["flair", "t1ce", "t1", "t2"]
    assert model["modalities"][0]["aliases"] == ["t2f"]
    assert model["scores"]["subsets"][0] == {"modalities": ["flair"], "dice": {"WT": 0.5, "TC": 0.25, "ET": None}}


def test_the_index_leads_on(api):
    for link in api.get("/").json()["links"].values():
        assert api.get(link).status_code in {200, 405, 503}


def test_the_openapi_document(api):
    document = api.get("/openapi.json").json()
    form = document["paths"]["/segment"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["flair"]["format"] == "binary"
    assert "t2f" in form["properties"]["flair"]["description"]
    assert form["properties"]["model"] | {"description": ""} == {
        "type": "string",
        "description": "",
        "enum": ["tiny"],
        "default": "tiny",
    }
    assert document["components"]["schemas"]["JobResource"]["examples"]
    assert "HTTPValidationError" not in json.dumps(document)
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= set(document["components"]["schemas"])
    for path in document["paths"].values():
        for method, operation in path.items():
            assert {"400", "421", "500", "503"} <= set(operation["responses"])
            assert ("403" in operation["responses"]) == (method != "get")
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    assert set(answer["content"]) == {"application/problem+json"}
                assert ("Retry-After" in answer.get("headers", {})) == (status in {"429", "503"})
    links = {
        link["operationId"]
        for path in document["paths"].values()
        for operation in path.values()
        for answer in operation["responses"].values()
        for link in answer.get("links", {}).values()
    }
    results = {"mask", "report", "preview", "dicom_seg", "probabilities", "probability"}
    assert links == {"job", "events", "cancel", "model"} | results
    assert links <= {operation["operationId"] for path in document["paths"].values() for operation in path.values()}


def test_a_form_without_models_can_be_described(served):
    shutil.rmtree(served.models / "tiny")
    with serving(served) as api:
        form = api.get("/openapi.json").json()["paths"]["/segment"]["post"]["requestBody"]["content"]
        assert set(form["multipart/form-data"]["schema"]["properties"]) == {
            *("model", "preprocess", "grid", "probabilities", "et_value", "priority")
        }


def test_every_kind_of_problem_has_its_page_and_its_place_in_the_document(api):
    document = json.dumps(api.get("/openapi.json").json())
    anywhere = {"not-found", "method-not-allowed", "unauthorized"}  # the last one: no key is asked for here
    for kind, known in KINDS.items():
        page = api.get(f"/problems/{kind}").json()
        assert (page["title"], page["status"]) == (known.title, known.status)
        if kind not in anywhere:
            assert f"`{kind}`" in document, kind


def test_logs_hold_ids_only(api, caplog):
    name = "Jane_Doe_1970.nii.gz"
    job = api.post("/segment", files={"flair": (name, scan())}).json()
    api.post("/segment", files={"flair": (name, b"Jane Doe was here")})
    api.get(f"/jobs/{job['id']}?token=Jane")
    api.get(f"/jobs/{job['id']}/mask")
    api.get("/jobs/Jane")
    api.delete(f"/jobs/{job['id']}")
    api.get("/livez")  # a line is written after its answer, but before the next request of the connection is read
    lines = [record.msg for record in caplog.records if isinstance(record.msg, dict)]
    of_job = [
        (line["event"], line.get("method"), line.get("route")) for line in lines if line.get("job_id") == job["id"]
    ]
    assert of_job == [
        ("upload begins", None, None),
        ("job accepted", None, None),
        ("request", "POST", "/segment"),
        ("request", "GET", "/jobs/{job_id}"),
        ("request", "GET", "/jobs/{job_id}/mask"),
        ("job deleted", None, None),
        ("request", "DELETE", "/jobs/{job_id}"),
    ]
    refused = next(line for line in lines if line["event"] == "upload refused")
    assert refused["kind"] == "not-nifti"
    assert refused["job_id"] in {line.get("job_id") for line in lines if line.get("status") == 415}
    assert "Jane" not in caplog.text


@pytest.mark.parametrize("expect", [b"", b"Expect: 100-continue\r\n"])
def test_who_is_refused_gets_the_answer_and_then_the_end_of_the_connection(served, expect):
    """Also one who never stops: the server reads on for a while so that the answer arrives, and then closes."""
    with limited(served, max_request_bytes=100_000, max_file_bytes=100_000) as api:
        address = (api.base_url.host, api.base_url.port)
        with socket.create_connection(address, timeout=20) as connection:
            head = b"POST /segment HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            connection.sendall(head + expect + b"Content-Length: 999999999\r\n\r\n")
            answer = b""
            if not expect:
                with suppress(OSError):
                    while True:
                        connection.sendall(bytes(1 << 16))
            with suppress(ConnectionError):
                while data := connection.recv(1 << 16):
                    answer += data
    if expect:
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"connection: close" in answer
        assert b"100 Continue" not in answer
