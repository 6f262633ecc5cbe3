"""`preprocess`, `grid` and `et_value` in the form of POST /segment."""

import json
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
    old = record.model_dump(exclude={"preprocess", "grid", "label_values"})
    assert Job.model_validate(old).preprocess == "auto"
    assert Job.model_validate(old).label_values == {}, "what the card says, as when it was sent"


@pytest.mark.parametrize(("data", "value"), [({}, 3), ({"et_value": ""}, 3), ({"et_value": "4"}, 4)])
def test_the_value_of_enhancing_tumour(api, settings, data, value):
    job = send(api, **data).json()
    assert job["labels"][3] == {"value": value, "name": "enhancing tumour"}
    client = connect(settings)
    assert JobStore(client, settings).get(job["id"]).label_values == {"enhancing tumour": value}
    client.close()


def changed_task(settings, change):
    """The model's card, with another task: `change` is given the task as it is in the file."""
    path = settings.models / "tiny" / "card.json"
    card = json.loads(path.read_text())
    change(card["task"])
    path.write_text(json.dumps(card))


def test_a_model_that_knows_one_value_keeps_it(api, settings):
    changed_task(settings, lambda task: task["labels"][3].pop("also_read"))
    assert send(api).json()["labels"][3]["value"] == 4
    refused = send(api, et_value=3).json()
    assert (refused["field"], refused["remedy"]) == ("et_value", "Name one of: 4.")
    assert "cannot write enhancing tumour as 3" in refused["detail"]


def test_a_model_without_enhancing_tumour_has_no_value_for_it(api, settings):
    changed_task(settings, lambda task: task.update(regions=task["regions"][:1]))
    assert send(api).json()["labels"][3]["value"] == 4
    refused = send(api, et_value=4).json()
    assert (refused["field"], refused["remedy"]) == ("et_value", "Leave it out.")
    assert "has no region ET of one label" in refused["detail"]


@pytest.mark.parametrize(
    ("data", "field", "detail"),
    [
        ({"preprocess": "maybe"}, "preprocess", "'maybe' is no way to preprocess"),
        ({"preprocess": "x" * 500}, "preprocess", "too long"),
        ({"grid": "t1"}, "grid", "the mask cannot lie on the grid of 't1', which is not sent"),
        ({"grid": "ct"}, "grid", "which is not sent"),
        ({"et_value": "5"}, "et_value", "'5' is no value for enhancing tumour"),
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
    for data in ({"preprocess": "raw"}, {"grid": "t2"}, {"et_value": "4"}):
        assert api.post("/segment", files=files, headers=headers, data=data).status_code == 422


def test_the_document_has_the_options(api):
    form = api.get("/openapi.json").json()["paths"]["/segment"]["post"]["requestBody"]
    fields = form["content"]["multipart/form-data"]["schema"]["properties"]
    assert fields["preprocess"]["enum"] == ["auto", "none", "raw"]
    assert fields["et_value"]["enum"] == ["3", "4"]
    assert {"flair", "t2w"} <= set(fields["grid"]["enum"])
