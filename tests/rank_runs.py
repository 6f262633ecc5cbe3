"""Several runs one after the other in the processes that torchrun started: to import torch takes longer than a run.

    torchrun --nproc-per-node 2 tests/rank_runs.py run1.yaml run2.yaml

After each, the weights must be the same on all ranks, bit for bit.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from training.config import TrainConfig
from training.ranks import Ranks, join
from training.trainer import Trainer


def run(path: Path, ranks: Ranks) -> None:
    trainer = Trainer(TrainConfig.read(path), ranks=ranks)
    assert trainer.run()
    weights = torch.cat([p.detach().flatten() for p in trainer.network.parameters()])
    for theirs in ranks.gather(weights):
        assert torch.equal(theirs, weights), "the ranks have come apart"


if __name__ == "__main__":
    with join() as own:
        for argument in sys.argv[1:]:
            run(Path(argument), own)
