import asyncio

import httpx
import pytest

from app.web.multipart import Form, MalformedFormError, PartBegins, PartData, PartEnds, boundary

BODY = (
    b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\ntiny\r\n'
    b'--B\r\nContent-Disposition: form-data; name="flair"; filename="a b.nii"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\n\x00\r\n--\r\n--A\x1f\x8b\r\n"
    b'--B\r\ncontent-disposition: form-data; name=t2; filename=""\r\n\r\n\r\n--B--\r\n'
)
PARTS = [
    ("model", False, False, b"tiny"),
    ("flair", True, False, b"\x00\r\n--\r\n--A\x1f\x8b"),
    ("t2", True, True, b""),
]


def parse(body: bytes, size: int, mark: bytes = b"B"):
    async def chunks():
        for start in range(0, len(body), size):
            yield body[start : start + size]

    async def run():
        parts = []
        async for event in Form(mark).events(chunks()):
            match event:
                case PartBegins(name, is_file, blank):
                    parts.append([name, is_file, blank, b"", False])
                case PartData(data):
                    parts[-1][3] += data
                case PartEnds():
                    parts[-1][4] = True
        assert all(part[4] for part in parts)
        return [tuple(part[:4]) for part in parts]

    return asyncio.run(run())


@pytest.mark.parametrize("size", [*range(1, 40), 10_000])
def test_parts_do_not_depend_on_how_the_body_is_cut(size):
    assert parse(BODY, size) == PARTS


def test_reads_what_httpx_writes():
    files = {"flair": ("x.nii.gz", b"\x1f\x8b" * 5000), "t1": ("ü.nii", b"--" * 999)}
    request = httpx.Request("POST", "http://x/", files=files, data={"model": "m"})
    parts = parse(request.read(), 777, boundary(request.headers["content-type"]))
    assert {name: data for name, _, _, data in parts} == {
        "model": b"m",
        "flair": files["flair"][1],
        "t1": files["t1"][1],
    }


@pytest.mark.parametrize(
    ("content_type", "found"),
    [
        ("multipart/form-data; boundary=abc", b"abc"),
        ('Multipart/Form-Data; charset=utf-8; boundary="a b"', b"a b"),
        ("multipart/form-data", None),
        ("multipart/form-data; boundary=", None),
        ("multipart/mixed; boundary=abc", None),
        ("application/json", None),
        ("", None),
        (None, None),
    ],
)
def test_boundary(content_type, found):
    assert boundary(content_type) == found


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "closing boundary"),
        (BODY[:-20], "closing boundary"),
        (b"hello", "boundary or a part's header"),
        (b"--B\r\n\r\nx\r\n--B--\r\n", "no Content-Disposition"),
        (b"--B\r\nContent-Disposition: attachment; name=x\r\n\r\nx\r\n--B--\r\n", "no Content-Disposition"),
        (b"--B\r\nContent-Disposition: form-data\r\n\r\nx\r\n--B--\r\n", "with a name"),
        (b"--B\r\nbad header\r\n\r\nx\r\n--B--\r\n", "boundary or a part's header"),
        (b"--B\r\n" + b"X-A: 1\r\n" * 1000 + b"\r\nx\r\n--B--\r\n", "boundary or a part's header"),
        (b'--B\r\nContent-Disposition: form-data; name="m"\r\n\r\nx\r\n' * 65 + b"--B--\r\n", "more than 64 parts"),
    ],
)
def test_what_is_no_form_is_refused(body, words):
    with pytest.raises(MalformedFormError, match=words):
        parse(body, 64)


def test_a_boundary_that_is_too_long():
    with pytest.raises(MalformedFormError, match="too long"):
        Form(b"b" * 10_000)
