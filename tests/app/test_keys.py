"""API keys: what is kept of them, what they open, and for how long."""

import json
import os
import re
import socket
import subprocess
import sys
from datetime import timedelta
from functools import partial

import pytest
from own_redis import running
from scans import scan
from serving import serving
from typer.testing import CliRunner

from app.cli import cli
from app.jobs.connection import connect
from app.jobs.keys import KEYS, KeyStore, UnknownKeyError
from app.jobs.record import now
from app.jobs.settings import Settings
from app.redis_server import FOLDER, kept_url
from app.web.application import create_app


@pytest.fixture
def keys(client):
    return KeyStore(client)


@pytest.fixture
def guarded(settings):
    return settings.model_copy(update={"auth": "on"})


def test_a_key_is_recognised_until_it_is_revoked(keys):
    key, text = keys.create("viewer")
    assert re.fullmatch(r"passion_[0-9a-f]{8}_[\w-]{43}", text)
    assert keys.verify(text) == key
    assert [k.state for k in keys.all()] == ["active"]
    assert keys.revoke(key.id).revoked
    assert keys.verify(text) is None
    assert [k.state for k in keys.all()] == ["revoked"]
    with pytest.raises(UnknownKeyError):
        keys.revoke("00000000")


def test_a_key_expires(keys, client):
    key, text = keys.create("guest", days=1)
    assert keys.verify(text) == key
    over = key.model_copy(update={"expires": now() - timedelta(seconds=1)})
    client.hset(KEYS, key.id, over.model_dump_json())
    assert keys.verify(text) is None
    assert keys.all()[0].state == "expired"


def test_what_is_no_key_is_none(keys):
    key, text = keys.create("one")
    _, other = keys.create("two")
    secret, foreign = text[-43:], other[-43:]
    wrong = [
        "",
        "passion",
        secret,
        text + "x",
        text.upper(),
        f"passion_{key.id}_{foreign}",
        f"passion_00000000_{secret}",
    ]
    assert [keys.verify(word) for word in wrong] == [None] * len(wrong)


def test_redis_holds_no_secret(keys, client):
    _, text = keys.create("viewer")
    kept = json.dumps(client.hgetall(KEYS))
    assert text[-43:] not in kept
    assert client.keys("*") == [KEYS]


PROTECTED = [
    ("POST", "/segment"),
    ("GET", "/jobs/none"),
    ("GET", "/jobs/none/mask"),
    ("DELETE", "/jobs/none"),
    ("GET", "/models"),
    ("GET", "/models/none"),
]
PUBLIC = ["/", "/livez", "/docs", "/openapi.json", "/problems/unauthorized"]


def test_every_wrong_key_gets_the_same_answer_and_a_right_one_gets_through(guarded, keys, caplog):
    _, good = keys.create("good")
    revoked, ended = keys.create("revoked")
    keys.revoke(revoked.id)
    words = [None, "Basic abc", "Bearer", "Bearer nonsense", f"Bearer passion_00000000_{good[-43:]}", f"Bearer {ended}"]
    with serving(guarded) as api:
        answers = [api.get("/models", headers={"Authorization": word} if word else {}) for word in words]
        assert {(a.status_code, a.text, a.headers["www-authenticate"]) for a in answers} == {
            (401, answers[0].text, "Bearer")
        }
        assert answers[0].json()["type"] == "/problems/unauthorized"
        assert {api.request(method, path).status_code for method, path in PROTECTED} == {401}
        assert {api.get(path).status_code for path in PUBLIC} == {200}
        assert api.get("/readyz").status_code == 503
        api.headers["Authorization"] = f"Bearer {good}"
        assert api.get("/models").status_code == 200
        assert api.get("/jobs/none").json()["type"] == "/problems/unknown-job"
        keys.revoke(good.split("_")[1])
        assert api.get("/models").status_code == 401, "revoked, and still let in"
    lines = [record.msg for record in caplog.records if isinstance(record.msg, dict)]
    assert {line.get("key") for line in lines if line.get("status") == 200 and line.get("route") == "/models"} == {
        good.split("_")[1]
    }
    assert good[-43:] not in caplog.text


def test_the_description_says_what_needs_a_key(guarded):
    with serving(guarded) as api:
        document = api.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["API key"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            needed = path.startswith(("/segment", "/jobs", "/models", "/metrics"))
            assert ("security" in operation) == ("401" in operation["responses"]) == needed, path


def test_where_no_key_is_asked_for_none_is_described(settings):
    document = create_app(settings).openapi()
    assert "securitySchemes" not in document["components"]
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert not [operation for operation in operations if "security" in operation or "401" in operation["responses"]]


@pytest.mark.parametrize("expect", [b"", b"Expect: 100-continue\r\n"])
def test_without_a_key_the_body_is_not_waited_for(guarded, expect):
    """Neither the half of it that has not come, nor the whole that was only announced."""
    with serving(guarded) as api, socket.create_connection((api.base_url.host, api.base_url.port), timeout=2) as line:
        head = b"POST /segment HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        line.sendall(head + expect + b"Content-Length: 200\r\n\r\n" + (b"" if expect else bytes(100)))
        answer = line.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 401")
    assert b"connection: close" in answer
    assert list(guarded.store.iterdir()) == []


@pytest.mark.parametrize(
    ("host", "auth", "guarded"),
    [
        ("127.0.0.1", "auto", False),
        ("127.8.8.8", "auto", False),
        ("::1", "auto", False),
        ("LOCALHOST", "auto", False),
        ("0.0.0.0", "auto", True),
        ("::", "auto", True),
        ("10.0.0.3", "auto", True),
        ("localhost.example", "auto", True),
        ("", "auto", True),
        ("127.0.0.1", "on", True),
        ("0.0.0.0", "off", False),
    ],
)
def test_keys_are_asked_for_beyond_loopback(host, auth, guarded):
    assert Settings(host=host, auth=auth).guarded is guarded


def test_the_client_sends_its_key_and_says_what_is_wrong_with_it(guarded, keys, tmp_path, monkeypatch):
    image, file = tmp_path / "flair.nii.gz", tmp_path / "key"
    image.write_bytes(scan())
    _, text = keys.create("client")
    file.write_text(f"{text}\n")
    with serving(guarded) as api:
        command = ["segment", "--url", str(api.base_url), "--flair", str(image), "-o", str(tmp_path / "mask.nii")]
        for key, arguments, words in (
            ("", [], "asks for an API key: put it into PASSION_KEY"),
            ("x", [], "does not take the API key in PASSION_KEY"),
            ("two words", [], "must be one word"),
            (text, [], "no model"),  # there is none: the key was taken
            ("x", ["--key-file", str(file)], "no model"),
            ("", ["--key-file", str(tmp_path / "none")], "cannot read the API key"),
        ):
            monkeypatch.setenv("PASSION_KEY", key)
            done = CliRunner().invoke(cli, [*command, *arguments])
            assert (done.exit_code, words in done.stderr) == (2, True), done.stderr


def test_the_commands_find_the_redis_that_up_keeps_in_its_store(tmp_path, monkeypatch):
    """And so are the way to make a key for it."""
    for name in [n for n in os.environ if n.startswith("PASSION_") or n == "REDIS_URL"]:
        monkeypatch.delenv(name)
    store = tmp_path / "store"
    command = partial(CliRunner().invoke, cli)
    with running(store / FOLDER) as url:
        assert kept_url(store) == url
        create = [
            sys.executable,
            "-m",
            "app.cli",
            "keys",
            "create",
            "reading room",
            "--days",
            "2",
            "--store",
            str(store),
        ]
        made = subprocess.run(create, check=True, capture_output=True, text=True, timeout=60)
        assert made.stdout.count("\n") == 1
        assert "shown once" in made.stderr
        with connect(Settings(redis_url=url)) as client:
            key = KeyStore(client).verify(made.stdout.strip())
        monkeypatch.setenv("PASSION_STORE", str(store))
        (row,) = json.loads(command(["keys", "list", "--json"]).stdout)
        assert (row["id"], row["name"], row["state"]) == (key.id, "reading room", "active")
        assert "sha256" not in row
        assert command(["keys", "revoke", key.id]).exit_code == 0
        shown = command(["keys", "list"]).stdout
        assert all(word in shown for word in (key.id, "reading room", "revoked"))
        unknown = command(["keys", "revoke", "00000000"])
        assert (unknown.exit_code, "no key has the id 00000000" in unknown.stderr) == (2, True)
        assert command(["keys", "create", "a\nb"]).exit_code == 2
    away = command(["keys", "list"])
    assert (away.exit_code, "Redis does not answer" in away.stderr) == (1, True)
    nowhere = command(["keys", "list", "--store", str(tmp_path)])
    assert (nowhere.exit_code, "set REDIS_URL" in nowhere.stderr) == (1, True)
