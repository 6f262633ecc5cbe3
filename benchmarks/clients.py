"""Clients of the service as a process of their own, whose Python lock nobody else waits for: many that upload, or one
that polls. Writes JSON on standard output. Needs the standard library alone, so that it starts at once.

    python benchmarks/clients.py upload --port 8000 --body FILE --boundary MARK --clients 50
    python benchmarks/clients.py poll --port 8000 --path /jobs/ID --every 0.05    # until standard input ends
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path

PATIENCE = 600.0


def send(port: int, key: str, body: Path, boundary: str) -> tuple[int, float, float]:
    """One POST /segment: the status (0: the connection broke), seconds from the first byte sent to the answer, and
    what Retry-After says."""
    connection, began = HTTPConnection("127.0.0.1", port, timeout=PATIENCE), time.perf_counter()
    try:
        connection.connect()
        began = time.perf_counter()
        connection.putrequest("POST", "/segment")
        connection.putheader("Authorization", f"Bearer {key}")
        connection.putheader("Content-Type", f"multipart/form-data; boundary={boundary}")
        connection.putheader("Content-Length", str(body.stat().st_size))
        connection.endheaders()
        try:
            with body.open("rb") as file:
                connection.sock.sendfile(file)  # in the kernel: no Python per byte
        except OSError:
            pass  # refused before its end: the answer may be there all the same
        response = connection.getresponse()
        response.read()
        return response.status, time.perf_counter() - began, float(response.headers.get("Retry-After", "0"))
    except (HTTPException, OSError):
        return 0, time.perf_counter() - began, 1.0
    finally:
        connection.close()


def client(port: int, key: str, body: Path, boundary: str, start: threading.Barrier) -> dict:
    """One who uploads, and after a 503 comes back when told to: all statuses, the last attempt's seconds, and those
    from the first attempt on."""
    start.wait()
    began = time.perf_counter()
    statuses = []
    while True:
        status, seconds, pause = send(port, key, body, boundary)
        statuses.append(status)
        if status not in {0, 503} or time.perf_counter() - began > PATIENCE:
            return {"statuses": statuses, "seconds": seconds, "in_all": time.perf_counter() - began}
        time.sleep(pause)


def upload(options: argparse.Namespace, key: str) -> dict:
    """All of them at the same time."""
    start = threading.Barrier(options.clients)
    began = time.perf_counter()
    with ThreadPoolExecutor(options.clients) as pool:
        futures = [
            pool.submit(client, options.port, key, options.body, options.boundary, start)
            for _ in range(options.clients)
        ]
        clients = [future.result() for future in futures]
    return {"seconds": time.perf_counter() - began, "clients": clients}


def poll(options: argparse.Namespace, key: str) -> dict:
    """GET at fixed times over one connection, until standard input ends. A request that is late because the one before
    it was slow is counted from when it was due: a stall must not hide the requests that it held up."""
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    connection = HTTPConnection("127.0.0.1", options.port, timeout=PATIENCE)
    headers = {"Authorization": f"Bearer {key}"}
    waits, due = [], time.perf_counter()
    while True:
        connection.request("GET", options.path, headers=headers)
        response = connection.getresponse()
        response.read()
        if response.status != 200:
            raise RuntimeError(f"{response.status} {response.reason}")
        waits.append(time.perf_counter() - due)
        due += options.every
        if over.wait(max(0.0, due - time.perf_counter())):
            return {"seconds": waits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["upload", "poll"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--body", type=Path)
    parser.add_argument("--boundary")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--path")
    parser.add_argument("--every", type=float, default=0.05)
    options = parser.parse_args()
    key = os.environ["PASSION_KEY"]
    print(json.dumps(upload(options, key) if options.what == "upload" else poll(options, key)))


if __name__ == "__main__":
    main()
