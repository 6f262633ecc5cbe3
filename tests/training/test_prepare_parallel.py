"""Work in processes: results, errors a user can read, and no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from training.errors import UserError
from training.parallel import cores, each


def square(number: int) -> int:
    return number * number


def die(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def full_disk(number: int) -> int:
    raise OSError(28, "No space left on device", "/data/x.npy")


def refuse(number: int) -> int:
    raise UserError("no")


@pytest.mark.parametrize("workers", [1, 2])
def test_every_item_once(workers):
    assert sorted(each(square, range(5), workers)) == [0, 1, 4, 9, 16]
    assert not multiprocessing.active_children()


def test_nothing_to_do():
    assert list(each(square, [], 2)) == []


def test_a_killed_worker_is_named():
    with pytest.raises(UserError, match="--workers 1"):
        list(each(die, range(4), 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_come_through(workers):
    with pytest.raises(UserError, match=r"/data/x.npy: No space left"):
        list(each(full_disk, range(2), workers))
    with pytest.raises(UserError, match="no"):
        list(each(refuse, range(2), workers))
    assert not multiprocessing.active_children()


def test_there_is_a_core():
    assert cores() >= 1
