"""GET /metrics, and what is made of it: the dashboard and the alerts name nothing that is not there."""

import json
import re
import shutil
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families
from scans import scan
from serving import serving

from app.jobs.gpu import GOOD_FOR, GPUS, DeviceMemory, Gpus
from app.jobs.presence import Consumer, Presence
from app.jobs.record import Failure, InputFile, Job, new_id
from app.jobs.store import JobStore
from app.jobs.tally import Tally
from app.web.meters import Meters

DOCKER = Path(__file__).parents[2] / "docker"
MEMORY = DeviceMemory("w@here", "cuda:0", reserved=3, peak=5, total=80)


def scrape(api):
    """The samples of an answer, by name and labels; and the names of all metrics, with their suffixes."""
    response = api.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(response.text))
    assert all(family.documentation for family in families)
    samples = {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}
    ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    names = {f.name + end for f in families for end in ends.get(f.type, [""])}
    return samples, {name for name in names if name.startswith("passion_")}


def value(samples, name, **labels):
    return samples[(f"passion_{name}", *sorted(labels.items()))]


def queued(jobs):
    job = Job(id=new_id(), model="m", inputs=(InputFile(modality="t2", filename="t2.nii"),))
    return jobs.create(job)


def test_what_is_told_of_jobs(settings, client):
    """By any API process, whoever had them: here all is written past the one that is asked."""
    jobs = JobStore(client, settings)
    done, failed, running, _waiting = (queued(jobs) for _ in range(4))
    jobs.succeed(jobs.begin(done.id, "w"), {}, "", seconds={"segmenting": 0.7, "saving": 0.1})
    jobs.fail(jobs.begin(failed.id, "w"), Failure(kind="images", title="t", detail="d"))
    jobs.begin(running.id, "w")
    Tally(client).count_resent()
    Presence(client).renew(Consumer("w@here", 2))
    Gpus(client).write(MEMORY)
    with serving(settings) as api:
        samples, _ = scrape(api)
    assert value(samples, "redis_up") == 1
    assert value(samples, "jobs_accepted_total") == 4
    assert value(samples, "jobs_ended_total", state="succeeded", reason="") == 1
    assert value(samples, "jobs_ended_total", state="failed", reason="images") == 1
    assert value(samples, "jobs_ended_total", state="failed", reason="internal") == 0
    assert value(samples, "job_stage_seconds_bucket", stage="segmenting", le="0.5") == 0
    assert value(samples, "job_stage_seconds_bucket", stage="segmenting", le="1.0") == 1
    assert value(samples, "job_stage_seconds_bucket", stage="segmenting", le="+Inf") == 1
    assert value(samples, "job_stage_seconds_sum", stage="segmenting") == 0.7
    assert value(samples, "job_stage_seconds_count", stage="all") == 2
    assert value(samples, "job_stage_seconds_count", stage="loading") == 0
    assert value(samples, "runs_lost_total") == 0
    assert value(samples, "messages_resent_total") == 1
    assert (value(samples, "queue_depth"), value(samples, "jobs_running")) == (1, 1)
    assert 0 < value(samples, "queue_oldest_seconds") < 60
    assert (value(samples, "workers"), value(samples, "worker_children")) == (1, 2)
    told = [value(samples, "gpu_memory_bytes", worker="w@here", device="cuda:0", kind=k) for k in ("reserved", "peak")]
    assert told == [3, 5]


def test_what_a_process_tells_of_itself(settings, tiny):
    shutil.copytree(tiny, settings.models / "tiny")
    with serving(settings) as api:
        job = api.post("/segment", files={"t2": scan()}).json()
        api.post("/segment", files={"t2": b"no NIfTI"})
        api.request("PROPFIND", f"/jobs/{job['id']}")
        api.get("/Jane_Doe")
        samples, _ = scrape(api)
        text = api.get("/metrics").text
    assert value(samples, "uploads_in_flight") == value(samples, "event_streams") == 0
    assert value(samples, "upload_bytes_total") > len(scan())
    assert value(samples, "uploads_refused_total", kind="not-nifti") == 1
    assert value(samples, "http_requests_total", method="POST", route="/segment", status="202") == 1
    assert value(samples, "http_requests_total", method="POST", route="/segment", status="415") == 1
    assert value(samples, "http_requests_total", method="other", route="/jobs/{job_id}", status="405") == 1
    assert value(samples, "http_requests_total", method="GET", route="unmatched", status="404") == 1
    assert value(samples, "http_request_seconds_count", route="/segment") == 2
    assert any(name == "process_resident_memory_bytes" for name, *_ in samples)
    assert job["id"] not in text
    assert "Jane" not in text


def test_without_redis_the_process_tells_of_itself_all_the_same(settings):
    away = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    with serving(away) as api:
        samples, names = scrape(api)
    assert value(samples, "redis_up") == 0
    assert "passion_uploads_in_flight" in names
    assert "passion_jobs_accepted_total" not in names


def test_two_applications_in_one_process_count_apart():
    one, other = Meters(), Meters()
    one.refused("not-nifti")
    assert one.registry.get_sample_value("passion_uploads_refused_total", {"kind": "not-nifti"}) == 1
    assert other.registry.get_sample_value("passion_uploads_refused_total", {"kind": "not-nifti"}) is None


def test_what_a_worker_said_of_its_device_is_told_for_an_hour(client):
    gpus = Gpus(client)
    gpus.write(DeviceMemory("w@here", "cuda:1", 1, 1, 80))
    gpus.write(MEMORY)
    assert gpus.read() == [MEMORY, DeviceMemory("w@here", "cuda:1", 1, 1, 80)]
    told = json.loads(client.hget(GPUS, "w@here/cuda:1"))
    client.hset(GPUS, "w@here/cuda:1", json.dumps(told | {"at": told["at"] - GOOD_FOR}))
    assert gpus.read() == [MEMORY]


def test_dashboard_and_alerts_name_what_there_is(settings):
    dashboard = json.loads((DOCKER / "grafana" / "passion-seg.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    shown = [target["expr"] for panel in panels for target in panel["targets"]]
    alerts = yaml.safe_load((DOCKER / "prometheus-alerts.yaml").read_text())
    watched = [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    asked = [v["definition"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    with serving(settings) as api:
        _, names = scrape(api)
    assert set(re.findall(r"passion_\w+", " ".join([*shown, *watched, *asked]))) <= names
    in_dashboard = {re.sub("_(bucket|sum|count)$", "", name) for name in re.findall(r"passion_\w+", " ".join(shown))}
    assert in_dashboard == {re.sub("_(bucket|sum|count)$", "", name) for name in names}
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(set(places)) == len(places)
    assert len({p["id"] for p in dashboard["panels"]}) == len(places)
    assert {p["datasource"]["uid"] for p in panels} == {"${datasource}"}
