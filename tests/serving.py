"""The API in a thread of this process, on a free port, for the length of a test."""

import threading
from contextlib import contextmanager

import httpx
import uvicorn

from app.stack import listen
from app.web.application import create_asgi


@contextmanager
def serving(settings):
    """An HTTP client of it."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_asgi(settings), log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
