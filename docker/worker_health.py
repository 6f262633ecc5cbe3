"""The worker image's health check: does this very container's worker take messages off the queue?

Celery calls a worker NAME@HOST, and the worker vouches for that name as long as its loop turns (`app.jobs.presence`).
"""

from __future__ import annotations

import socket
import sys
import time

from app.jobs.connection import connect
from app.jobs.presence import CONSUMING
from app.jobs.settings import Settings

workers = connect(Settings()).zrangebyscore(CONSUMING, time.time(), "+inf")
if not any(name.endswith(f"@{socket.gethostname()}") for name in workers):
    sys.exit(f"no worker of {socket.gethostname()} consumes the queue")
