"""A service under load: uploads side by side, a poll in the midst of them, memory; a worker against the bare predictor.

    python -m benchmarks.load                                                        # some five minutes
    python -m benchmarks.load --clients 8 --megabytes 2 --jobs 4 --rounds 1          # a quick look

Redis, API, worker and clients are real processes of this machine and share its cores: `--nice 19` lets the uploading
clients have what the service leaves, as clients elsewhere would. An API key is asked for. While the uploads come no
worker runs: on one machine it would be the processor that is measured. Files: int16, noise throughout, so that gzip
finds as little as in a scan of a whole head.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
from isal import igzip
from rich.console import Console
from rich.table import Table

from app.jobs.keys import KeyStore
from app.jobs.settings import packaged_checkpoints
from benchmarks.parts import Parts, until
from training.phantom import make_subject, write_subject

HERE = Path(__file__).parent
MODEL = "glioma-phantom-rfnet"
MODALITIES = ("flair", "t1ce", "t1", "t2")
PLANES_PER_MB = 15.5
"""Planes of 240 x 240 voxels that make a megabyte, compressed: a volume of 155 of them makes 10."""
NOISE = 14.0


def scan(megabytes: float, seed: int) -> bytes:
    """A .nii.gz file of about that size."""
    rng = np.random.default_rng(seed)
    shape = (240, 240, max(2, round(PLANES_PER_MB * megabytes)))
    grid = np.meshgrid(*[np.linspace(-1, 1, n, dtype=np.float32) for n in shape], indexing="ij", sparse=True)
    head = 800 * np.clip(1.2 - sum(axis**2 for axis in grid), 0, None)
    data = head + NOISE * rng.standard_normal(shape, dtype=np.float32)
    return igzip.compress(nib.Nifti1Image(data.astype(np.int16), np.diag([1, 1, 1, 1])).to_bytes(), 3)


def form(files: int, megabytes: float, boundary: str) -> bytes:
    """A body of multipart/form-data with so many files."""
    parts = []
    for seed, name in enumerate(MODALITIES[:files]):
        disposition = f'Content-Disposition: form-data; name="{name}"; filename="scan.nii.gz"'
        head = f"--{boundary}\r\n{disposition}\r\nContent-Type: application/gzip\r\n\r\n"
        parts.append(head.encode() + scan(megabytes, seed) + b"\r\n")
    return b"".join(parts) + f"--{boundary}--\r\n".encode()


class Memory:
    """Resident memory of a process in MB, looked at ten times a second from a thread."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.before = self.peak = self.now()
        self._thread.start()

    def now(self) -> float:
        return self._process.memory_info().rss / 1e6

    def stop(self) -> float:
        self._over.set()
        self._thread.join()
        return self.peak

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            self.peak = max(self.peak, self.now())


class Clients:
    """Starts processes of `clients.py`."""

    def __init__(self, port: int, key: str) -> None:
        self._port = port
        self._environment = os.environ | {"PASSION_KEY": key}

    def start(self, what: str, *options: object, nice: int = 0) -> subprocess.Popen[str]:
        command = ["nice", "-n", nice, sys.executable, HERE / "clients.py", what, "--port", self._port, *options]
        return subprocess.Popen(
            [str(part) for part in command],
            env=self._environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )


def result(process: subprocess.Popen[str]) -> dict:
    """What it printed, once it is done. Raises `RuntimeError`."""
    out, _ = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{process.args}: status {process.returncode}")
    found: dict = json.loads(out)
    return found


def uploads(parts: Parts, clients: Clients, job: str, body: Path, boundary: str, options: argparse.Namespace) -> dict:
    """One round: all upload, one polls."""
    assert parts.api is not None
    api = psutil.Process(parts.api.pid)
    memory, used = Memory(parts.api.pid), sum(api.cpu_times()[:2])
    poll = clients.start("poll", "--path", f"/jobs/{job}", "--every", 1 / options.polls)
    sent = result(
        clients.start("upload", "--body", body, "--boundary", boundary, "--clients", options.clients, nice=options.nice)
    )
    waits = 1000 * np.array(result(poll)["seconds"])
    used = sum(api.cpu_times()[:2]) - used
    peak = memory.stop()
    time.sleep(2)
    done = [c["seconds"] for c in sent["clients"] if c["statuses"][-1] == 202]
    in_all = [c["in_all"] for c in sent["clients"]]
    return {
        "seconds": sent["seconds"],
        "uploads_per_s": len(done) / sent["seconds"],
        "mb_per_s": len(done) * body.stat().st_size / 1e6 / sent["seconds"],
        "answers": dict(Counter(str(status) for c in sent["clients"] for status in c["statuses"])),
        "accepted_in_the_end": len(done),
        "until_202_p50_s": float(np.percentile(done, 50)),
        "until_202_p95_s": float(np.percentile(done, 95)),
        "with_retries_p95_s": float(np.percentile(in_all, 95)),
        "polls": len(waits),
        "poll_p50_ms": float(np.percentile(waits, 50)),
        "poll_p99_ms": float(np.percentile(waits, 99)),
        "poll_max_ms": float(waits.max()),
        "api_cpu_s": used,
        "memory_before_mb": memory.before,
        "memory_peak_mb": peak,
        "memory_after_mb": memory.now(),
    }


def served(parts: Parts, files: dict[str, bytes], jobs: int) -> tuple[dict, str]:
    """Seconds per job, from the first one's start to the last one's end, those of them that were between two jobs or
    else outside the predictor's stages, and the processor's, of the worker; and the id of the last one."""
    (worker,) = parts.workers
    # It stands still while the jobs are sent: their checks would have the other half of its core.
    os.killpg(worker.pid, signal.SIGSTOP)
    try:
        sent = [parts.post(files).raise_for_status().json() for _ in range(jobs)]
    finally:
        os.killpg(worker.pid, signal.SIGCONT)
    used = cpu(worker.pid)
    # Seldom asked, the last one first: each question takes from the processor what is measured here.
    done = [until(lambda job=job: over(parts.job(job)), 600, "a job is not over", 0.5) for job in reversed(sent)][::-1]
    if wrong := [job["error"] for job in done if job["state"] != "succeeded"]:
        raise RuntimeError(wrong)
    begin = min(datetime.fromisoformat(job["started"]) for job in done)
    end = max(datetime.fromisoformat(job["finished"]) for job in done)
    seconds = (end - begin).total_seconds()
    staged = sum(sum(job["seconds"].values()) for job in done)
    return {
        "s": seconds / jobs,
        "outside_s": (seconds - staged) / jobs,
        "cpu_s": (cpu(worker.pid) - used) / jobs,
    }, str(done[-1]["id"])


def over(job: dict) -> dict | None:
    """The job, if it is."""
    return job if job["state"] in {"succeeded", "failed", "cancelled"} else None


def cpu(pid: int) -> float:
    """Seconds of the processor that a process and its children have had."""
    process = psutil.Process(pid)
    return float(sum(sum(p.cpu_times()[:2]) for p in (process, *process.children(recursive=True))))


def bare(model: Path, images: dict[str, Path], jobs: int) -> dict:
    """Seconds per job of the predictor alone, and the processor's."""
    command = [sys.executable, HERE / "bare.py", "--model", model, "--jobs", jobs]
    command += [word for name, path in images.items() for word in ("--image", f"{name}={path}")]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ  # as `Parts` gives it to the worker
    process = subprocess.Popen([str(word) for word in command], env=environment, text=True, stdout=subprocess.PIPE)
    found = result(process)
    return {"s": float(np.mean(found["seconds"])), "cpu_s": found["cpu_s"]}


def throughput(parts: Parts, folder: Path, options: argparse.Namespace) -> tuple[dict, str]:
    """The worker and the bare predictor by turns; and the id of a job that is done."""
    shape, spacing = (round(240 / options.spacing),) * 2 + (round(155 / options.spacing),), options.spacing
    subject = write_subject(folder / "phantom", make_subject(1, 1, shape=shape, spacing=spacing))
    images = {name: next(subject.glob(f"*_{name}.nii.gz")) for name in MODALITIES}
    files = {name: path.read_bytes() for name, path in images.items()}
    model = packaged_checkpoints() / MODEL
    parts.start_worker()
    parts.ready(1)
    served(parts, files, 1)  # loads the model
    turns = []
    for turn in range(options.turns):
        first = bare(model, images, options.jobs) if turn % 2 else None
        service, job = served(parts, files, options.jobs)
        turns.append({"service": service, "bare": first or bare(model, images, options.jobs)})
    mean = {who: {k: float(np.mean([t[who][k] for t in turns])) for k in turns[0][who]} for who in turns[0]}
    return {
        "jobs": options.jobs * options.turns,
        **mean,
        "share_of_bare": mean["bare"]["s"] / mean["service"]["s"],
        "share_of_bare_by_cpu": mean["bare"]["cpu_s"] / mean["service"]["cpu_s"],
        "turns": turns,
    }, job


def measure(folder: Path, options: argparse.Namespace) -> dict:
    boundary = secrets.token_hex(16)
    body = folder / "body"
    body.write_bytes(form(options.files, options.megabytes, boundary))
    waiting = options.clients * options.rounds + options.jobs + 1
    settings = {"auth": "on", "queue_limit": max(200, waiting), "jobs_per_key": waiting, "uploads": options.uploads}
    with Parts(folder, packaged_checkpoints(), **settings) as parts:
        parts.start_redis()
        parts.start_api()
        _, key = KeyStore(parts.client).create("load")
        parts.http.headers["Authorization"] = f"Bearer {key}"
        found: dict = {"body_mb": body.stat().st_size / 1e6}
        found["worker"], job = throughput(parts, folder, options)
        for worker in list(parts.workers):
            parts.kill_worker(worker)
        clients = Clients(parts.port, key)
        found["uploads"] = [uploads(parts, clients, job, body, boundary, options) for _ in range(options.rounds)]
    return found


def table(found: dict, options: argparse.Namespace) -> Table:
    rounds = found["uploads"]
    title = f"{options.clients} clients, {options.files} files each, {found['body_mb']:.0f} MB an upload"
    rows = Table("", *[f"round {n + 1}" for n in range(len(rounds))], title=title)
    for name, kind in {
        "uploads_per_s": ".2f",
        "mb_per_s": ".0f",
        "accepted_in_the_end": "d",
        "until_202_p50_s": ".1f",
        "until_202_p95_s": ".1f",
        "with_retries_p95_s": ".1f",
        "polls": "d",
        "poll_p50_ms": ".1f",
        "poll_p99_ms": ".1f",
        "poll_max_ms": ".1f",
        "api_cpu_s": ".1f",
        "memory_before_mb": ".0f",
        "memory_peak_mb": ".0f",
        "memory_after_mb": ".0f",
    }.items():
        rows.add_row(name.replace("_", " "), *[f"{r[name]:{kind}}" for r in rounds])
    rows.add_row("answers", *[", ".join(f"{n} x {status}" for status, n in r["answers"].items()) for r in rounds])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50, help="that upload at the same time")
    parser.add_argument("--files", type=int, default=4, choices=range(1, 5), help="of one upload")
    parser.add_argument("--megabytes", type=float, default=10.0, help="of one file")
    parser.add_argument("--rounds", type=int, default=2, help="of uploads; memory must not grow from one to the next")
    parser.add_argument("--polls", type=float, default=20.0, help="of a job per second meanwhile")
    parser.add_argument("--uploads", type=int, default=64, help="PASSION_UPLOADS: more at a time are told to come back")
    parser.add_argument("--nice", type=int, default=0, help="niceness of the clients that upload")
    parser.add_argument("--jobs", type=int, default=10, help="of a worker, and of the bare predictor, in one turn")
    parser.add_argument("--turns", type=int, default=2, help="by which the two alternate")
    parser.add_argument("--spacing", type=float, default=1.5, help="voxel edge of the jobs' images, mm")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="passion-load-") as folder:
        found = measure(Path(folder), options)
    console = Console()
    console.print(table(found, options))
    worker = found["worker"]
    service, alone = worker["service"], worker["bare"]
    by_turn = ", ".join(f"{turn['bare']['s'] / turn['service']['s']:.1%}" for turn in worker["turns"])
    console.print(
        f"One worker: {service['s']:.3f} s a job, the bare predictor {alone['s']:.3f} s: {worker['share_of_bare']:.1%} "
        f"of its throughput (by turn: {by_turn}; {worker['jobs']} jobs each). Of the processor: {service['cpu_s']:.3f} "
        f"and {alone['cpu_s']:.3f} s ({worker['share_of_bare_by_cpu']:.1%}). Outside the predictor's stages: "
        f"{1000 * service['outside_s']:.0f} ms a job."
    )
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
