"""The worker image's health check: does this very container's worker take messages off the queue?

Celery calls a worker NAME@HOST, and the worker vouches for that name as long as its loop turns (`app.jobs.presence`).
"""

from __future__ import annotations

import socket
import sys

from app.jobs.connection import connect
from app.jobs.presence import Presence
from app.jobs.settings import Settings

workers = Presence(connect(Settings())).workers()
if not any(worker.name.endswith(f"@{socket.gethostname()}") for worker in workers):
    sys.exit(f"no worker of {socket.gethostname()} consumes the queue")
