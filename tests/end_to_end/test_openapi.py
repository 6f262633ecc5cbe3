"""What the OpenAPI document says is what the service does: schemathesis reads the one and asks the other (a Redis, an
API, a worker) with all of its checks. `openapi/` has what it is told beside; with more examples: CONTRIBUTING.md."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.jobs.keys import KeyStore
from benchmarks.parts import Parts

pytestmark = pytest.mark.slow

TOLD = Path(__file__).parent / "openapi"
SEED = 1
EXAMPLES = os.environ.get("SCHEMA_EXAMPLES", "15")
"""Per operation; the cases that a schema's limits call for come on top."""


@pytest.fixture
def parts(tmp_path, models):
    # Few jobs at a time, because whoever reads the events of one waits for all before it.
    with Parts(tmp_path, models, auth="on", jobs_per_key=8) as parts:
        parts.start_redis()
        parts.start_api()
        parts.start_worker()
        parts.ready(1)
        yield parts


def answered(parts, key):
    """How often, by method, route and status."""
    text = parts.http.get("/metrics", headers={"Authorization": f"Bearer {key}"}).raise_for_status().text
    return Counter(
        {
            (sample.labels["method"], sample.labels["route"], sample.labels["status"]): int(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "passion_http_requests_total"
        }
    )


def test_the_service_does_what_its_document_says(parts, tmp_path):
    (first, key), (second, other) = [KeyStore(parts.client).create(name) for name in ("first", "second")]
    keys = tmp_path / "keys.json"
    users = {"first": key, "second": other}
    headers = {name: [{"name": "Authorization", "value": f"Bearer {key}"}] for name, key in users.items()}
    keys.write_text(json.dumps({"auth": [{"name": name, "fixedHeaders": headers[name]} for name in users]}))
    before = answered(parts, key)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli"),
            *("--config-file", TOLD / "schemathesis.toml"),
            *("run", f"{parts.http.base_url}/openapi.json", "--checks", "all"),
            *("--seed", str(SEED), "--max-examples", EXAMPLES, "--generation-database", "none", "--no-color"),
        ],
        env=os.environ | {"TOLD": str(TOLD), "KEYS": str(keys)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = answered(parts, key) - before
    for reached in [
        ("POST", "/segment", "202"),
        ("GET", "/jobs/{job_id}", "200"),
        ("GET", "/jobs/{job_id}/events", "200"),
        ("DELETE", "/jobs/{job_id}", "204"),
    ]:
        assert found[reached], (reached, found)
    assert not [answer for answer in found if answer[2] >= "500"]
    assert f'"key": "{first.id}"' in parts.log()
    assert f'"key": "{second.id}"' in parts.log(), "nobody asked for the job of another"
