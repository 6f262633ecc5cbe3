"""The page about the API at /docs: Swagger UI, from here and from nowhere else.

A page that loads scripts from elsewhere does not work in a hospital's closed network, and where it does it runs a
stranger's code on the origin that holds the scans.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse

from app.web.whole_file import WholeFile

pages = APIRouter(include_in_schema=False)

# Addresses are relative, so that the page works under a proxy's path too.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>PASSION Seg</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="icon" href="data:,">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
# `validatorUrl`: by default the page sends the description's address to validator.swagger.io.
_START = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
});
"""
_POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
    # Swagger UI writes style attributes.
    "style-src 'self' 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@pages.get("/docs")
def docs() -> HTMLResponse:
    """The page."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})


@pages.get("/docs/start.js")
def start() -> Response:
    """What starts it; a file of its own, so that the page needs no inline script."""
    return Response(_START, media_type="text/javascript")


@pages.get("/docs/swagger-ui-bundle.js")
def script() -> WholeFile:
    """Swagger UI."""
    return _bundled("swagger-ui-bundle.js", "text/javascript")


@pages.get("/docs/swagger-ui.css")
def style() -> WholeFile:
    """Its style."""
    return _bundled("swagger-ui.css", "text/css")


def _bundled(name: str, media_type: str) -> WholeFile:
    # Of fastapi-offline only the files are used: Swagger UI 5, the first major version to read OpenAPI 3.1.
    path = Path(str(files("fastapi_offline") / "static" / name))
    return WholeFile(path, media_type=media_type, headers={"Cache-Control": "max-age=86400"})
