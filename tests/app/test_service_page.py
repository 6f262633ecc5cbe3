"""The page about the service keeps up with the code."""

import re
from pathlib import Path

from app.jobs.settings import Settings
from app.web.application import create_app

PAGE = (Path(__file__).parents[2] / "docs" / "service.md").read_text()
ELSEWHERE = {
    *("redis_url", "store", "models", "default_model", "allowed_hosts", "cors_origins"),
    *("needs", "serve_models", "serve_devices", "bucket"),
}


def test_the_table_has_every_setting_with_its_default_and_meaning():
    rows = dict(re.findall(r"^\| `PASSION_(\w+)` \| (.*) \|$", PAGE, re.MULTILINE))
    fields = {name.upper(): field for name, field in Settings.model_fields.items()}
    assert set(rows) == set(fields)
    for name, field in fields.items():
        assert field.description in rows[name], name
        if name.lower() not in ELSEWHERE:
            default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
            assert f"`{default}`" in rows[name], name


def test_the_table_has_every_route(settings):
    paths = create_app(settings).openapi()["paths"]
    for path, operations in ((p.replace("job_id", "id"), o) for p, o in paths.items()):
        for method in operations:
            assert f"`{method.upper()} {path}" in PAGE, (method, path)
