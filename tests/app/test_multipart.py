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
LONG = "header of more than 4096 bytes|boundary or a part's header"  # ours, or the parser's own bound
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
        (b"--B\r\n" + b"X-A: 1\r\n" * 1000 + b"\r\nx\r\n--B--\r\n", "boundary or a part's header|more than 8"),
        (b"--B\r\nX-A: " + b"a" * (4 << 20), LONG),
        (b"--B\r\n" + b"X" * (4 << 20), LONG),
        (b'--B\r\nContent-Disposition: form-data; name="' + b"n" * 10_000 + b'"\r\n\r\nx', LONG),
        (b"--B\r\nX\x00A: 1\r\n\r\nx\r\n--B--\r\n", "boundary or a part's header"),
        (b"\r\n" * (1 << 20), "closing boundary"),
        (b"\r\n" + b"a" * (1 << 20), "boundary or a part's header"),
        (b"--" + b"B" * (1 << 20), "boundary or a part's header"),
        (b'--B\r\nContent-Disposition: form-data; name="m"\r\n\r\nx\r\n' * 65 + b"--B--\r\n", "more than 64 parts"),
    ],
)
def test_what_is_no_form_is_refused(body, words):
    with pytest.raises(MalformedFormError, match=words):
        parse(body, 64)


def test_a_boundary_that_is_too_long():
    with pytest.raises(MalformedFormError, match="too long"):
        Form(b"b" * 10_000)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "a/b",
        "..",
        "a\\b",
        "n" * 1500,
        "%00",
        "%0d%0aSet-Cookie:x",
        "*",
        "'",
        "\0",
        "\u202egnp.exe",
        "ü",
    ],
)
def test_odd_names_are_names_like_others(name):
    header = f'form-data; name="{name}"; filename="{name}"'.encode()
    body = b"--B\r\nContent-Disposition: " + header + b"\r\n\r\nx\r\n--B--\r\n"
    ((found, is_file, blank, data),) = parse(body, 100)
    assert (is_file, blank, data) == (True, False, b"x")
    assert found == name.replace("\\\\", "\\")


@pytest.mark.parametrize("name", [b"\xff\xfe", b"flair\xc3\x28", b"\xed\xa0\x80"])
def test_names_that_are_no_text_become_text(name):
    body = b'--B\r\nContent-Disposition: form-data; name="' + name + b'"\r\n\r\nx\r\n--B--\r\n'
    ((found, *_),) = parse(body, 100)
    assert "\N{REPLACEMENT CHARACTER}" in found
    assert found.encode()


def test_what_follows_the_last_boundary_is_passed_over():
    assert parse(BODY + b"x" * 100_000, 1000) == PARTS


def test_a_form_holds_no_more_than_a_header_and_a_chunk():
    """Of a header without end no more is kept than its bound, whatever it is sent in."""
    form = Form(b"B")

    async def chunks():
        yield b"--B\r\nX-A: "
        while True:
            yield b"a" * 1000

    async def run():
        async for _ in form.events(chunks()):
            pass

    with pytest.raises(MalformedFormError, match=LONG):
        asyncio.run(run())
    assert len(form._value) <= 4096
