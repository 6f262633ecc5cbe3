"""A service under fire: many jobs, a few workers, and every few seconds the kill of something at random.

    python -m benchmarks.soak --jobs 500 --workers 3 --every 4

Redis, API and workers are real processes of this machine. Killed is, by lot, a worker's child, a whole worker (another
one is started), or the API (started again). Counted is what became of the jobs; the exit status is 1 unless each
request made one job, each job succeeded, each mask is that of the same input undisturbed, and no file is left over.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from app.jobs.tally import Tally
from benchmarks.parts import Parts, kill, until
from benchmarks.untrained import untrained
from models.checkpoint import save_checkpoint
from models.task import Task

SENDERS = 4
INPUTS = 5
ORPHANS_KEPT = 10.0
PATIENCE = 900.0


def images(size: int) -> list[bytes]:
    """Small .nii.gz files, each another one."""
    files = []
    for seed in range(INPUTS):
        rng = np.random.default_rng(seed)
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, size)] * 3, indexing="ij"))
        data = ((grid**2).sum(0) < 0.8) * (100 + 10 * rng.standard_normal((size,) * 3))
        files.append(gzip.compress(nib.Nifti1Image(data.astype(np.float32), np.eye(4)).to_bytes(), 1))
    return files


def small_model(folder: Path) -> Path:
    """A checkpoint with random weights that segments small windows."""
    task = Task.load("glioma")
    task = Task.model_validate(task.model_dump() | {"patch_size": (16,) * 3, "min_crop": 16})
    checkpoint = untrained("rfnet", task)
    save_checkpoint(folder, checkpoint.card, checkpoint.network)
    return folder


def send(parts: Parts, files: list[bytes], number: int, counts: Counter[str]) -> dict:
    """POST until it is answered 202, with the same Idempotency-Key each time."""
    while True:
        try:
            response = parts.post({"flair": files[number % INPUTS]}, Idempotency_Key=f"request-{number}")
        except httpx.HTTPError:
            counts["uploads cut off"] += 1
            time.sleep(0.2)
            continue
        if response.status_code == 202:
            job: dict = response.json()
            return job
        counts[f"uploads answered {response.status_code}"] += 1
        if response.status_code not in {500, 503}:
            raise RuntimeError(response.text)
        time.sleep(min(2.0, float(response.headers.get("Retry-After", "1"))))


def use(
    parts: Parts, files: list[bytes], jobs: int, counts: Counter[str], over: threading.Event
) -> tuple[list[dict], list[dict]]:
    """Send all jobs and wait for all: as accepted, and as they ended."""
    try:
        with ThreadPoolExecutor(SENDERS) as pool:
            sent = list(pool.map(lambda n: send(parts, files, n, counts), range(jobs)))
        return sent, [until(lambda job=job: final(parts, job), PATIENCE, "a job is not over") for job in sent]
    finally:
        over.set()


def fire(parts: Parts, rng: random.Random, every: float, over: threading.Event, kills: Counter[str]) -> None:
    """Kill something every few seconds, and start it again. For the main thread: what a thread has started ends with
    it."""
    while not over.wait(rng.uniform(0.5, 1.5) * every):
        what = rng.choices(["child", "worker", "API"], [3, 2, 1])[0]
        worker = rng.choice(parts.workers)
        if what == "child":
            try:
                parts.child_of(worker).kill()
            except (IndexError, psutil.NoSuchProcess):  # it is being replaced just now
                continue
        elif what == "worker":
            parts.kill_worker(worker)
            parts.start_worker()
        else:
            assert parts.api is not None
            kill(parts.api)
            parts.start_api()
        kills[what] += 1


def soak(folder: Path, jobs: int, workers: int, every: float, size: int, seed: int, attempts: int) -> dict:
    """All of it; the counts."""
    model = small_model(folder / "models" / "untrained")
    settings = {
        "lease": 5.0,
        "stop_grace": 1.0,
        "orphans_kept": ORPHANS_KEPT,
        "upload_timeout": 8.0,
        "max_attempts": attempts,
    }
    files, counts, kills, over = images(size), Counter[str](), Counter[str](), threading.Event()
    with Parts(folder, model.parent, **settings) as parts:
        parts.start_redis()
        parts.start_api()
        for _ in range(workers):
            parts.start_worker()
        parts.ready(workers)
        undisturbed = [mask(parts, parts.finished(send(parts, files, -INPUTS + n, counts))) for n in range(INPUTS)]
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            users = pool.submit(use, parts, files, jobs, counts, over)
            fire(parts, random.Random(seed), every, over, kills)
            sent, done = users.result()
        seconds = time.monotonic() - began
        good = [(n, job) for n, job in enumerate(done) if job["state"] == "succeeded"]
        wrong = sum(mask(parts, job) != undisturbed[n % INPUTS] for n, job in good)
        known = {job["id"] for job in own_jobs(parts)}
        time.sleep(1.5 * ORPHANS_KEPT)
        tally = Tally(parts.client).read()
        return {
            "jobs sent": jobs,
            "different jobs": len({job["id"] for job in sent}),
            "jobs known to the service": len(known) - INPUTS,
            **{f"jobs {state}": n for state, n in Counter(job["state"] for job in done).items()},
            "masks unlike the undisturbed": wrong,
            "folders of no job": len(parts.on_store() - known),
            "masks left of runs that were lost": stray_masks(parts),
            "most attempts at a job": max(job["attempts"] for job in done),
            "runs taken from lost workers": tally.lost,
            "messages sent again": tally.resent,
            **dict(sorted(counts.items())),
            **{f"kills of {what}": n for what, n in kills.items()},
            "seconds": round(seconds, 1),
        }


def final(parts: Parts, job: dict) -> dict | None:
    """The job, if it is over and the API is there to say so."""
    with suppress(httpx.HTTPError):
        now = parts.job(job)
        return now if now["state"] not in {"queued", "running"} else None
    return None


def mask(parts: Parts, job: dict) -> bytes:
    """The voxels of a job's mask."""
    data = parts.http.get(job["links"]["mask"]).raise_for_status().content
    return np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(data)).dataobj).tobytes()


def own_jobs(parts: Parts) -> list[dict]:
    jobs, page = [], "/jobs?limit=200"
    while page:
        document = parts.http.get(page).raise_for_status().json()
        jobs += document["jobs"]
        page = document["next"]
    return jobs


def stray_masks(parts: Parts) -> int:
    return sum(max(0, len(list(folder.glob("output/mask-*"))) - 1) for folder in parts.settings.store.iterdir())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--every", type=float, default=4.0, help="seconds between kills, on average")
    parser.add_argument("--size", type=int, default=40, help="voxels along each axis of an input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attempts", type=int, default=20, help="times a job may be started")
    parser.add_argument("--out", type=Path, help="write the counts as JSON")
    options = vars(parser.parse_args())
    out = options.pop("out")
    with tempfile.TemporaryDirectory(prefix="passion-soak-") as folder:
        counts = soak(Path(folder), **options)
    table = Table("count", "", title="A service under fire")
    for name, value in counts.items():
        table.add_row(name, str(value))
    Console().print(table)
    if out:
        out.write_text(json.dumps(counts, indent=1) + "\n")
    jobs = options["jobs"]
    whole = all(counts.get(name) == jobs for name in ("different jobs", "jobs known to the service", "jobs succeeded"))
    clean = not any(n for name, n in counts.items() if name.startswith(("masks", "folders")))
    return 0 if whole and clean else 1


if __name__ == "__main__":
    sys.exit(main())
