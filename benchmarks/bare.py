"""The predictor alone: the same files again and again, each mask saved. Seconds of each, and of the
processor on average, on standard output as JSON.

python benchmarks/bare.py --model FOLDER --jobs 10 --image flair=FILE --image t2=FILE
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from models.checkpoint import Checkpoint
from models.predictor import Predictor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=10)
    parser.add_argument("--image", action="append", required=True)
    options = parser.parse_args()
    files = {name: Path(path) for name, path in (image.split("=", 1) for image in options.image)}
    predictor = Predictor(Checkpoint.load(options.model, device="cpu"), "cpu")
    with tempfile.TemporaryDirectory(prefix="passion-bare-") as folder:
        mask = Path(folder) / "mask.nii.gz"
        predictor.segment(files, preprocess="auto").save(mask)  # the first one pays for what the others find in memory
        ends, used = [time.perf_counter()], time.process_time()
        for _ in range(options.jobs):
            predictor.segment(files, preprocess="auto").save(mask)
            ends.append(time.perf_counter())
        used = time.process_time() - used
    print(json.dumps({"seconds": [end - begin for begin, end in pairwise(ends)], "cpu_s": used / options.jobs}))


if __name__ == "__main__":
    main()
