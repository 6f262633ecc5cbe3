"""What the API does before a route is reached: strange hosts and pages, headers, slow and many clients."""

import re
import shutil
import socket
import time
from contextlib import ExitStack, contextmanager, suppress

import anyio
import httpx
import pytest
from scans import scan
from serving import serving

from app.jobs.blobs import BlobStore
from app.jobs.connection import connect
from app.jobs.settings import Settings
from app.jobs.store import JobStore
from app.web.application import create_asgi
from app.web.service import TURNS


def changed(settings, **changes):
    return serving(settings.model_copy(update=changes))


@contextmanager
def connection(api):
    with socket.create_connection((api.base_url.host, api.base_url.port), timeout=10) as line:
        yield line


def everything(line):
    """What comes until the server closes."""
    answer = b""
    with suppress(ConnectionError):
        while data := line.recv(1 << 16):
            answer += data
    return answer


def document(line):
    """What comes until a JSON document is complete, which may be long before the server closes."""
    answer = b""
    while not answer.endswith(b"}"):
        data = line.recv(1 << 16)
        assert data, answer
        answer += data
    return answer


HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


def test_every_answer_has_the_headers_that_keep_a_browser_in_bounds(settings, tiny):
    shutil.copytree(tiny, settings.models / "tiny")
    with changed(settings, auth="on") as api:
        answers = {401: api.get("/models"), 200: api.get("/"), 404: api.get("/nothing")}
    with serving(settings) as api:
        answers[421] = api.get("/", headers={"Host": "evil.example"})
        missing = api.get("/jobs/none")
        with connection(api) as line:
            line.sendall(b"this is no HTTP\r\n\r\n")
            raw = everything(line)
        shutil.rmtree(settings.store)
        settings.store.write_text("a file where a folder should be")
        answers[500] = api.post("/segment", files={"flair": scan()})
    for status, answer in answers.items():
        assert answer.status_code == status
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert answers[500].headers["cache-control"] == missing.headers["cache-control"] == "no-store"
    assert raw.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"/problems/not-http" in raw
    assert b"x-content-type-options: nosniff" in raw


@pytest.mark.parametrize(
    ("changes", "host", "status"),
    [
        ({}, "localhost:8000", 200),
        ({}, "127.0.0.1", 200),
        ({}, "[::1]:8000", 200),
        ({}, "evil.example:8000", 421),
        ({}, "", 421),
        ({}, "[", 421),
        ({"allowed_hosts": "seg.example, other"}, "SEG.example", 200),
        ({"allowed_hosts": "seg.example"}, "localhost", 200),
        ({"allowed_hosts": "seg.example"}, "evil.example", 421),
        ({"host": "10.0.0.3", "allowed_hosts": "seg.example"}, "10.0.0.3:8000", 200),
        ({"host": "10.0.0.3"}, "whatever.example", 200),
        ({"auth": "on"}, "whatever.example", 200),
    ],
)
def test_hosts(asgi, changes, host, status):
    assert asgi(changes, "GET", "/livez", Host=host).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 404),
        ({"Origin": "http://localhost:8000"}, 404),
        ({"Origin": "https://viewer.example"}, 404),
        ({"Origin": "https://viewer.example", "Sec-Fetch-Site": "cross-site"}, 404),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://localhost:9000"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 404),
    ],
)
def test_pages_of_other_origins_change_nothing(asgi, headers, status):
    changes, headers = {"cors_origins": "https://viewer.example"}, {"Host": "localhost:8000", **headers}
    answer = asgi(changes, "DELETE", "/jobs/none", **headers)
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["type"] == "/problems/foreign-origin"
        assert asgi(changes, "GET", "/models", **headers).status_code == 200


def test_a_browsers_question_beforehand_needs_no_key(asgi):
    ask = {
        "Origin": "https://viewer.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,idempotency-key",
    }
    shared = {"cors_origins": "https://viewer.example", "auth": "on"}
    allowed = asgi(shared, "OPTIONS", "/segment", **ask)
    assert allowed.headers["access-control-allow-origin"] == "https://viewer.example"
    assert asgi(shared, "OPTIONS", "/segment", **ask | {"Origin": "https://evil.example"}).status_code == 400
    answer = asgi(shared, "GET", "/models", Origin="https://viewer.example")
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == "https://viewer.example"
    assert answer.headers["access-control-expose-headers"] == "Location, Retry-After"
    without = asgi({}, "GET", "/models", Origin="https://viewer.example")
    assert "access-control-allow-origin" not in without.headers


@pytest.fixture
def asgi(settings):
    """The application with changed settings, called without a server: for what lies before and beside the jobs."""

    def call(changes, method, path, **headers):
        async def once():
            transport = httpx.ASGITransport(create_asgi(settings.model_copy(update=changes)))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.request(method, path, headers=headers)

        return anyio.run(once)

    return call


@pytest.mark.parametrize("origins", ["*", "viewer.example", "https://viewer.example/path"])
def test_only_origins_can_be_named(origins):
    with pytest.raises(ValueError, match="PASSION_CORS_ORIGINS"):
        Settings(cors_origins=origins)


def test_the_page_about_the_api_loads_nothing_from_elsewhere(asgi):
    page = asgi({}, "GET", "/docs")
    policy = page.headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "default-src 'none'" in policy
    for text in (page.text, asgi({}, "GET", "/docs/start.js").text):
        assert "http:" not in text
        assert "https:" not in text
    assert "<script>" not in page.text, "the policy forbids inline scripts"
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    for address in [*addresses, "openapi.json"]:
        if not address.startswith("data:"):
            assert asgi({}, "GET", f"/{address}").status_code == 200, address
    assert asgi({}, "GET", "/redoc").status_code == 404
    assert asgi({}, "GET", "/openapi.json").json()["openapi"].startswith("3.1")
    assert 'PACKAGE_VERSION:"5.' in asgi({}, "GET", "/docs/swagger-ui-bundle.js").text, "4 does not read OpenAPI 3.1"


@pytest.mark.parametrize("part", ["bytes=0-9", "bytes=99999999-", "pages=1"])
def test_a_file_comes_as_a_whole(asgi, part):
    whole = asgi({}, "GET", "/docs/swagger-ui.css")
    asked = asgi({}, "GET", "/docs/swagger-ui.css", range=part)
    assert (asked.status_code, asked.content) == (200, whole.content)
    assert asked.headers["accept-ranges"] == "none"


HEAD = b"POST /segment HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
PART = b'--b\r\nContent-Disposition: form-data; name="flair"; filename="x"\r\n\r\n\x1f\x8b'


@pytest.fixture
def served(settings, tiny):
    shutil.copytree(tiny, settings.models / "tiny")
    return settings


@pytest.mark.parametrize("limits", [{"idle_timeout": 0.2}, {"upload_timeout": 0.3}])
def test_a_body_that_does_not_come_is_not_waited_for(served, limits):
    with changed(served, **limits) as api, connection(api) as line:
        line.sendall(HEAD + b"Content-Length: 1000\r\n\r\n" + PART)
        answer = document(line)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"/problems/too-slow" in answer
    assert b"connection: close" in answer
    assert list(served.store.iterdir()) == []


def test_a_body_that_comes_in_drops_is_not_waited_for_either(served):
    with changed(served, upload_timeout=0.4) as api, connection(api) as line:
        line.sendall(HEAD + b"Content-Length: 100000\r\n\r\n" + PART)
        with suppress(ConnectionError):
            for _ in range(30):
                line.sendall(b"x")
                time.sleep(0.02)
        assert document(line).startswith(b"HTTP/1.1 408")
    assert list(served.store.iterdir()) == []


def test_a_head_that_does_not_end_is_cut_off(settings):
    with changed(settings, idle_timeout=0.3) as api, connection(api) as first, connection(api) as later:
        later.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert document(later).startswith(b"HTTP/1.1 200")
        for line in (first, later):
            line.sendall(b"GET /livez HTTP/1.1\r\nHost: loc")
        assert everything(first) == b""
        assert everything(later) == b""


def test_more_uploads_than_allowed_are_told_to_come_again(served):
    with changed(served, uploads=1) as api, connection(api) as line:
        line.sendall(HEAD + b"Content-Length: 1000\r\n\r\n" + PART)
        while not list(served.store.glob(".incoming-*/input/part-0")):
            time.sleep(0.01)
        answer = api.post("/segment", files={"flair": scan()})
        assert (answer.status_code, answer.json()["type"]) == (503, "/problems/busy")
        assert answer.headers["retry-after"]
        assert api.get("/models").status_code == 200
        line.shutdown(socket.SHUT_RDWR)
        while list(served.store.glob(".incoming-*")):
            time.sleep(0.01)
        assert api.post("/segment", files={"flair": scan()}).status_code == 202


def test_senders_who_pause_do_not_keep_the_turns_of_others(served):
    with changed(served) as api, ExitStack() as stack:
        for _ in range(TURNS + 1):
            line = stack.enter_context(connection(api))
            line.sendall(HEAD + b"Content-Length: 1000\r\n\r\n" + PART)
        while len(list(served.store.glob(".incoming-*/input/part-0"))) < TURNS + 1:
            time.sleep(0.01)
        assert api.post("/segment", files={"flair": scan()}).status_code == 202


def test_refused_uploads_give_their_turns_back(served):
    with changed(served) as api:
        for _ in range(TURNS + 1):
            assert api.post("/segment", files={"flair": b"this is no scan"}).is_client_error
        assert api.post("/segment", files={"flair": scan()}).status_code == 202


def test_more_connections_than_allowed_are_told_to_come_again(settings):
    with changed(settings, connections=1) as api, connection(api):
        answer = httpx.get(api.base_url)
        assert (answer.status_code, answer.json()["type"]) == (503, "/problems/busy")
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_an_answer_that_is_not_taken_is_given_up(served):
    """A mask larger than what the kernel keeps for a reader who does not read."""
    with changed(served, idle_timeout=0.3) as api:
        job = api.post("/segment", files={"flair": scan()}).json()
        with finish(served, job["id"]).open("wb") as file:
            file.truncate(64 << 20)
        with connection(api) as line:
            line.sendall(f"GET /jobs/{job['id']}/mask HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            time.sleep(0.8)
            assert len(everything(line)) < 64 << 20


def finish(settings, job_id):
    """As a worker would; where the mask belongs."""
    with connect(settings) as client:
        store = JobStore(client, settings)
        done = store.succeed(store.begin(job_id, "w"), {}, "")
    return BlobStore(settings.store).mask(done)
