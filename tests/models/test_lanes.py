"""Calls side by side: in order, with a share of the threads each, and none left behind."""

import threading

import pytest
import torch

from models.lanes import in_lanes


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def lanes_alive():
    return [t.name for t in threading.enumerate() if t.name.startswith("lane")]


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_results_come_in_order_from_as_many_threads(lanes):
    together = threading.Barrier(lanes, timeout=30)

    def work(item):
        together.wait()  # nothing comes unless so many run at a time
        return item, torch.get_num_threads()

    found = list(in_lanes(work, range(2 * lanes), lanes))
    assert found == [(item, 4 // lanes) for item in range(2 * lanes)]
    assert torch.get_num_threads() == 4
    assert not lanes_alive()


@pytest.mark.usefixtures("four_threads")
def test_what_a_call_raises_is_raised_here_and_nothing_runs_on():
    done = []

    def work(item):
        if item == 1:
            raise ValueError("no")
        done.append(item)
        return item

    found = in_lanes(work, range(1000), 2)
    assert next(found) == 0
    with pytest.raises(ValueError, match="no"):
        next(found)
    assert len(done) < 10
    assert not lanes_alive()
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("four_threads")
def test_whoever_stops_listening_stops_the_calls():
    started = []

    def work(item):
        started.append(item)
        return item

    found = in_lanes(work, range(1000), 2)
    assert next(found) == 0
    found.close()
    assert len(started) < 10
    assert not lanes_alive()
