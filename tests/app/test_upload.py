"""What `receive` makes of a request: files on the store, a fingerprint, or a problem."""

import asyncio
import shutil

import httpx
import pytest
from fastapi import Request
from scans import scan

from app.web.problems import Problem
from app.web.service import Service
from app.web.upload import receive

FLAIR, T2 = scan("flair"), scan("t2")


@pytest.fixture
def service(settings, tiny):
    for name in ("tiny", "other"):
        shutil.copytree(tiny, settings.models / name)
    service = Service.of(settings.model_copy(update={"default_model": "tiny"}))
    service.blobs.open()
    return service


def received(service, folder, files, model=None):
    parts = [(name, (name, data)) for name, data in files]
    parts += [("model", (None, model))] if model else []
    sent = httpx.Request("POST", "http://x/segment", files=parts)
    messages = [{"type": "http.request", "body": sent.read(), "more_body": False}]

    async def message():
        return messages.pop()

    scope = {"type": "http", "headers": [(k.lower(), v) for k, v in sent.headers.raw]}
    return asyncio.run(receive(Request(scope, message), service, folder))


def test_only_clean_copies_stay_under_the_modalities_names(service):
    folder = service.blobs.incoming("a")
    accepted = received(service, folder, [("t2w", T2), ("FLAIR", FLAIR)])
    assert [(item.modality, item.filename) for item in accepted.inputs] == [
        ("t2", "t2.nii.gz"),
        ("flair", "flair.nii.gz"),
    ]
    assert sorted(p.name for p in folder.iterdir()) == ["flair.nii.gz", "t2.nii.gz"]


def test_a_fingerprint_tells_model_modalities_order_and_bytes_apart(service):
    def of(*files, model=None):
        folder = service.blobs.incoming("a")
        fingerprint = received(service, folder, files, model).fingerprint
        service.blobs.delete("a")
        return fingerprint

    first = of(("flair", FLAIR), ("t2", T2))
    assert len(first) == 64
    assert first == of(("FLAIR", FLAIR), ("t2w", T2)) == of(("flair", FLAIR), ("t2", T2), model="tiny")
    others = {
        of(("t2", T2), ("flair", FLAIR)),
        of(("t2", FLAIR), ("flair", T2)),
        of(("flair", FLAIR)),
        of(("flair", FLAIR), ("t2", T2 + bytes(8))),
        of(("flair", FLAIR), ("t2", T2), model="other"),
        of(("flair", FLAIR), ("t1", T2)),
    }
    assert len(others | {first}) == 7


def test_a_store_that_is_full_while_the_copy_is_written(service):
    folder = service.blobs.incoming("a")
    (folder / ".flair.nii.gz.tmp").symlink_to("/dev/full")
    with pytest.raises(Problem) as caught:
        received(service, folder, [("flair", FLAIR)])
    assert caught.value.document.type == "/problems/store-full"
    assert [p.name for p in folder.iterdir()] == ["part-0"]
