"""`OwnHosts` and `OwnPages`: requests that a stranger's web page makes a user's browser send.

A service that asks for no key trusts whoever reaches it. A browser reaches it for any page it shows.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from app.jobs.settings import Settings, is_loopback, listed
from app.web.problems import Problem

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class OwnHosts:
    """Answers under the names that are the service's own, and no others.

    A page of evil.example whose name suddenly points to 127.0.0.1 (DNS rebinding) is of one origin with the service, as
    the browser sees it; the Host header still says evil.example. Names of the loopback interface and the address the
    service listens on cannot be had that way and are always right, so that health checks work under any settings.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        named = listed(settings.allowed_hosts)
        self._any = not named and (settings.guarded or not is_loopback(settings.host))
        self._names = {*named, settings.host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] == "http" and not self._any:
            name = _name(Headers(scope=scope).get("host", ""))
            if name not in self._names and not is_loopback(name):
                wrong = Problem(
                    "wrong-host",
                    "the service does not answer under the name in the Host header",
                    "Use the service's own address, or have the operator put the name into PASSION_ALLOWED_HOSTS.",
                )
                await wrong.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class OwnPages:
    """Refuses changes that a page of another origin asks for, unless the operator named that origin."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._origins = listed(settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] == "http" and scope["method"] not in SAFE and self._foreign(Headers(scope=scope)):
            foreign = Problem(
                "foreign-origin",
                "a web page of another origin may not change anything here",
                "Have the operator put the page's origin into PASSION_CORS_ORIGINS.",
            )
            await foreign.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _foreign(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is None:  # no browser, or one that says so in another way
            return headers.get("sec-fetch-site") == "cross-site"
        # Without the scheme: a proxy that speaks TLS for us hands on a host and no https.
        own = urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
        return not own and origin.lower() not in self._origins


def shared_with(app: ASGIApp, settings: Settings) -> ASGIApp:
    """`app`, readable by pages of the origins in the settings; itself where there are none. A browser's question
    beforehand (preflight) carries no key, and is answered here."""
    origins = listed(settings.cors_origins)
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("Authorization", "Idempotency-Key"),
        expose_headers=("Location", "Retry-After"),
    )


def _name(host: str) -> str:
    """The name in a Host header, without its port and an IPv6 address's brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
