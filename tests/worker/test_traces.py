"""One job is one trace, from the request to the mask, as a collector gets it."""

import shutil
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from scans import scan
from serving import serving

from app.jobs.blobs import BlobStore
from app.jobs.cards import ModelShelf
from app.jobs.connection import connect
from app.jobs.logs import configure
from app.jobs.store import JobStore
from app.jobs.traces import ENDPOINT, Traces
from worker.checkpoints import Checkpoints
from worker.task import Desk, run

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def collector():
    """An OTLP/HTTP receiver: its URL, and the spans that it got as (service, span)."""
    spans = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                service = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
                spans.extend((service, span) for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", spans
        server.shutdown()
        thread.join()


def desk_of(settings, client):
    shelf, jobs = ModelShelf(settings.models), JobStore(client, settings)
    checkpoints = Checkpoints(shelf, "cpu", settings.overlap, settings.precision)
    return Desk(settings, jobs, jobs, BlobStore(settings.store), checkpoints)


def facts(span):
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


def test_one_job_is_one_trace(settings, tiny, monkeypatch):
    shutil.copytree(tiny, settings.models / "tiny")
    client = connect(settings)
    with collector() as (url, spans):
        monkeypatch.setenv(ENDPOINT, url)
        with serving(settings) as api:
            job = api.post("/segment", files={"t2": ("Jane_Doe.nii.gz", scan("t2"))}).json()
            api.post("/segment", files={"t2": ("Jane_Doe.nii.gz", b"Jane Doe was here")})
            desk = desk_of(settings, client)
            run(job["id"], desk, "w@here")
            desk.traces.close()
    client.close()
    sent, refused = (span for service, span in spans if service == "passion-api")
    whole, *stages = sorted(
        (s for service, s in spans if service == "passion-worker"), key=lambda s: s.name != "segment"
    )
    assert (sent.name, whole.name) == ("POST /segment", "segment")
    assert whole.parent_span_id == sent.span_id
    assert [s.name for s in stages] == ["loading", "normalising", "segmenting", "restoring", "saving"]
    assert {s.parent_span_id for s in stages} == {whole.span_id}
    assert {s.trace_id for s in (sent, whole, *stages)} == {sent.trace_id}
    assert facts(sent) == {
        "passion.job_id": job["id"],
        "passion.model": "tiny",
        "passion.modalities": 1,
        "passion.state": "queued",
    }
    assert facts(whole) == facts(sent) | {"passion.attempt": 1, "passion.state": "succeeded"}
    assert facts(refused) == {"passion.state": "refused", "passion.problem": "not-nifti"}
    assert all(whole.start_time_unix_nano <= s.start_time_unix_nano <= s.end_time_unix_nano for s in stages)
    assert "Jane" not in str(spans)


def test_a_collector_that_is_away_holds_nobody_up(monkeypatch):
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.5")  # so that nothing tries on after the test
    monkeypatch.setattr("app.jobs.traces.LAST_WORDS", 0.2)
    traces = Traces("passion-api")
    with traces.span("POST /segment"):
        pass
    traces.close()


def test_without_the_package_one_line_says_so(settings, monkeypatch, caplog):
    configure(settings)
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with Traces("passion-api").span("POST /segment"):
        pass
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "not installed" in caplog.text
