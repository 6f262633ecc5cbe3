"""`Ranks`: the processes that train one model together, one per GPU, as `torchrun` starts them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.errors import UserError

TIMEOUT = timedelta(minutes=10)
"""How long one process waits for another that is alive: its slowest crop, or rank 0 writing a checkpoint."""

ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets, on every node."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run. What a step needs of all samples is summed here; alone, that is nothing to do.

    Sums take and give tensors on the CPU, the same on every rank. Every rank must call in the same order.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    """Among the processes of this node: the number of its GPU."""
    grouped: bool = False
    """Whether a process group is there: torchrun started this process, if only one."""

    @property
    def main(self) -> bool:
        """Whether this process writes: checkpoint, log, TensorBoard, progress."""
        return self.rank == 0

    def share(self, order: Sequence[int], size: int) -> list[int]:
        """This rank's part of an epoch: of every `world * size` subjects, `size`; of the rest, as many as the others
        or one fewer, which may be none. So no subject comes twice, and all ranks do the same number of steps."""
        step = self.world * size
        whole = len(order) // step * step
        mine = [i for at in range(0, whole, step) for i in order[at + self.rank * size : at + (self.rank + 1) * size]]
        rest = order[whole:]
        cuts = [len(rest) * r // self.world for r in (self.rank, self.rank + 1)]
        return [*mine, *rest[cuts[0] : cuts[1]]]

    def sum(self, vector: Tensor) -> Tensor:
        """The sum over ranks."""
        if self.world == 1:
            return vector
        total = vector.clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether it is so on one rank at least."""
        return bool(self.sum(torch.tensor(int(flag))))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, in order; shapes must be equal."""
        if self.world == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(found, tensor)
        return found

    def agree(self, what: object) -> bool:
        """Whether all ranks have the same, by its `repr`."""
        if self.world == 1:
            return True
        found: list[object] = [None] * self.world
        dist.all_gather_object(found, repr(what))
        return len(set(found)) == 1

    def wait(self) -> None:
        """Until all ranks are here."""
        self.any(False)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module as DistributedDataParallel, with the weights of rank 0 everywhere. Gradients are averaged over
        ranks, also where some did not use a weight; weights that none used keep the gradient None."""
        return DistributedDataParallel(module, find_unused_parameters=True) if self.grouped else module

    @contextmanager
    def alike(self, seed: Sequence[int], device: torch.device) -> Iterator[None]:
        """The same random numbers on every rank, whose own go on afterwards. Alone, a process draws its own."""
        if self.world == 1:
            yield
            return
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(_seed(seed))
            yield

    def diverge(self, seed: int) -> None:
        """Random numbers (of dropout) of its own for each rank; rank 0 goes on with what it has."""
        if not self.main:
            torch.manual_seed(_seed([seed, self.rank]))

    def first_to_tell(self) -> bool:
        """Whether no other rank has told an error yet: the user reads it once, of the rank that failed first."""
        try:
            told: int = dist.distributed_c10d._get_default_store().add("told", 1)
        except RuntimeError:  # torchrun is gone, and with it what the ranks had in common
            return True
        return told == 1


ALONE = Ranks()


@contextmanager
def join(timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """The ranks that torchrun started this process among; alone where it did not.

    Errors that end one rank end the others: with the status 2, and one message in all. Raises `UserError` for half of
    torchrun's environment, and where another rank is gone or silent for `timeout`.
    """
    ranks = _from_environment()
    if not ranks.grouped:
        yield ranks
        return
    try:
        # Gradients go by NCCL from GPU to GPU, the few numbers of a step by gloo.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timeout)
        yield ranks
        ranks.wait()
        # gloo's threads must end before the interpreter does, or they abort it now and then while it ends; what is left
        # of DistributedDataParallel, in a circle of references, would keep them.
        gc.collect()
        dist.destroy_process_group()
    except UserError as error:
        _tell_once(ranks, error)
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        _tell_once(
            ranks,
            UserError(
                f"rank {ranks.rank} of {ranks.world}: another process of this run has ended or does not answer: "
                "mend what it or torchrun says and start again with --resume, which goes on after the last epoch saved"
            ),
        )


def _tell_once(ranks: Ranks, error: UserError) -> None:
    # No farewell to the others: a process group with a dead member may wait for it.
    if dist.is_initialized() and not ranks.first_to_tell():
        raise SystemExit(2) from error
    raise error


def _is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed for want of a peer. gloo raises a bare RuntimeError, which names its source file."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _from_environment() -> Ranks:
    there = [name for name in ENVIRONMENT if name in os.environ]
    if "WORLD_SIZE" not in there or (os.environ["WORLD_SIZE"] == "1" and len(there) < len(ENVIRONMENT)):
        return ALONE
    absent = [name for name in ENVIRONMENT if name not in there]
    if absent:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(absent)} not set: start with torchrun "
            "(docs/ranks.md), or unset WORLD_SIZE to train in one process"
        )
    try:
        rank, local, world = (int(os.environ[name]) for name in ENVIRONMENT[:3])
    except ValueError:
        raise UserError("RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers: start with torchrun") from None
    return Ranks(rank, world, local, grouped=True)


def _seed(numbers: Sequence[int]) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
