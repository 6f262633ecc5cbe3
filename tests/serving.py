"""The API in a thread of this process, on a free port, for the length of a test."""

import threading
from contextlib import contextmanager

import httpx
import uvicorn

from app.stack import listen
from app.web.server import server_config


@contextmanager
def serving(settings, key=None):
    """An HTTP client of it, with an API key if one is given."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(server_config(settings))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=30, headers=headers
        ) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
