"""`Housekeeping`: what an API process does besides answering: it looks after lost jobs and removes what has expired."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog
from redis import RedisError

from app.jobs.blobs import Blobs
from app.jobs.bucket import StoreAwayError
from app.jobs.connection import connect
from app.jobs.logs import where
from app.jobs.reaper import Reaper
from app.jobs.settings import Settings
from app.jobs.sweeper import Sweeper

log = structlog.get_logger("app.web")


class Housekeeping:
    """A thread for each of the two, with a connection of their own: sweeping may take a while on a slow disk."""

    def __init__(self, settings: Settings, blobs: Blobs) -> None:
        client = connect(settings)
        self._reaper = Reaper(client, settings)
        sweeper = Sweeper(client, settings, blobs)
        self._over = threading.Event()
        self._threads = [
            self._thread("reaper", self._reaper.round, self._reaper.interval),
            self._thread("sweeper", sweeper.round, sweeper.interval),
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End after the round that is on."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._reaper.close()

    def _thread(self, name: str, go_round: Callable[[], None], interval: float) -> threading.Thread:
        def keep_going() -> None:
            while not self._over.wait(interval):
                try:
                    go_round()
                except RedisError:
                    log.warning("redis does not answer: housekeeping waits", task=name)
                except StoreAwayError:
                    log.warning("the store does not answer: housekeeping waits", task=name)
                except Exception as error:  # it must never end while the process lives
                    log.error("housekeeping failed", task=name, where=where(error))

        return threading.Thread(target=keep_going, name=name, daemon=True)
