"""Tasks side by side, each with its share of the threads."""

import threading
from types import SimpleNamespace

import pytest
import torch

from sparsary.training.lanes import Lanes
from sparsary.training.loop import most_lanes


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_lanes_share_the_threads_and_give_them_back():
    with Lanes(2) as lanes:
        assert lanes.run([torch.get_num_threads] * 3) == [2, 2, 2]
        assert torch.get_num_threads() == 4


def test_there_are_no_more_lanes_than_threads_or_tasks():
    assert [(Lanes(most).count, Lanes(most).threads) for most in (1, 3, 9)] == [(1, 4), (3, 1), (4, 1)]


def test_tasks_run_at_the_same_time():
    meeting = threading.Barrier(2, timeout=60)
    with Lanes(2) as lanes:
        lanes.run([meeting.wait] * 2)


def test_an_error_is_raised_after_all_tasks_have_ended():
    ended = []

    def fails():
        raise ValueError("planted")

    with Lanes(2) as lanes, pytest.raises(ValueError, match="planted"):
        lanes.run([fails, lambda: ended.append(1), lambda: ended.append(2)])
    assert sorted(ended) == [1, 2]
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("device", "processes", "kl", "count"),
    [("cpu", 1, False, 3), ("cuda", 1, False, 1), ("cpu", 2, False, 1), ("cpu", 1, True, 1)],
)
def test_members_step_side_by_side_unless_they_share_more_than_the_processor(device, processes, kl, count):
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=processes)
    members = [SimpleNamespace(recipe=SimpleNamespace(uses_kl=uses)) for uses in (False, False, kl)]
    groups = [SimpleNamespace(members=members[:1]), SimpleNamespace(members=members[1:])]
    assert most_lanes(groups, accelerator) == count
