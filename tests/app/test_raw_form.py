"""`preprocess` and `grid` in the form of POST /segment."""

import shutil

import pytest
from scans import scan
from serving import serving

from app.jobs.connection import connect
from app.jobs.record import Job
from app.jobs.store import JobStore


@pytest.fixture
def api(settings, tiny):
    shutil.copytree(tiny, settings.models / "tiny")
    with serving(settings) as client:
        yield client


def send(api, **data):
    return api.post("/segment", files={"flair": scan("flair"), "t2w": scan("t2")}, data=data)


def test_the_options_stand_in_the_record(api, settings):
    job = send(api).json()
    assert (job["preprocess"], job["grid"]) == ("auto", "flair")
    job = send(api, preprocess="raw", grid="t2w").json()
    assert (job["preprocess"], job["grid"]) == ("raw", "t2")
    client = connect(settings)
    record = JobStore(client, settings).get(job["id"])
    client.close()
    assert (record.preprocess, record.grid) == ("raw", "t2")
    old = record.model_dump(exclude={"preprocess", "grid"})
    assert Job.model_validate(old).preprocess == "auto"


@pytest.mark.parametrize(
    ("data", "field", "detail"),
    [
        ({"preprocess": "maybe"}, "preprocess", "'maybe' is no way to preprocess"),
        ({"preprocess": "x" * 500}, "preprocess", "too long"),
        ({"grid": "t1"}, "grid", "the mask cannot lie on the grid of 't1', which is not sent"),
        ({"grid": "ct"}, "grid", "which is not sent"),
    ],
)
def test_an_option_that_cannot_be_had_is_refused(api, data, field, detail):
    response = send(api, **data)
    document = response.json()
    assert (response.status_code, document["type"], document["field"]) == (422, "/problems/invalid-request", field)
    assert detail in document["detail"]
    assert document["remedy"]


def test_another_option_is_another_request(api):
    headers = {"Idempotency-Key": "one"}
    files = {"flair": scan("flair"), "t2": scan("t2")}
    first = api.post("/segment", files=files, headers=headers).json()
    same = api.post("/segment", files=files, headers=headers, data={"preprocess": "auto"})
    assert same.json()["id"] == first["id"]
    for data in ({"preprocess": "raw"}, {"grid": "t2"}):
        assert api.post("/segment", files=files, headers=headers, data=data).status_code == 422


def test_the_document_has_the_options(api):
    form = api.get("/openapi.json").json()["paths"]["/segment"]["post"]["requestBody"]
    fields = form["content"]["multipart/form-data"]["schema"]["properties"]
    assert fields["preprocess"]["enum"] == ["auto", "none", "raw"]
    assert {"flair", "t2w"} <= set(fields["grid"]["enum"])
