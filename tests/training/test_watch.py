"""A rank that works on a part of its own hears signals, the other ranks' requests to stop, and which of them hang."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from sparsary.sae.ranks import RanksLostError
from sparsary.training import processes, watch
from sparsary.training.signals import Stopped, StopRequest
from sparsary.training.watch import Watch


@pytest.fixture
def store(monkeypatch):
    """The store of a process group in which this process is rank 0 of 2; the tests write for rank 1."""
    found = dist.HashStore()
    monkeypatch.setattr(processes, "_store", lambda: found)
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(watch, "WATCH_SECONDS", 0.0)
    return found


@pytest.fixture
def own():
    return Watch(StopRequest(), lambda: "in the test; all is kept.")


def test_a_signal_of_this_rank_stops_it_and_is_told(store, own):
    own.beat("unit 3")
    own.stop.signal_number = 15
    with pytest.raises(Stopped, match=r"Stopped in the test; all is kept\. The same command continues") as stopped:
        own.beat("unit 4")
    assert stopped.value.signal_number == 15
    assert store.get(processes.HEED) == b"15"


def test_a_signal_of_another_rank_stops_this_one(store, own):
    store.set(processes.HEED, "2")
    with pytest.raises(Stopped) as stopped:
        own.beat("unit 4")
    assert stopped.value.signal_number == 2


def test_after_another_rank_s_failure_this_one_comes_to_the_roll_call(store, own):
    store.set(processes.HEED, "0")
    with pytest.raises(RanksLostError):
        own.beat("unit 4")


def test_what_a_rank_did_last_is_known(store, own):
    own.beat("harvesting unit 7")
    assert processes._last_seen(0).startswith("harvesting unit 7, ")
    store.set("sparsary/beat/1", "0 step 12")
    assert processes._last_seen(1).startswith("at step 12, ")
    processes.beat("step 13")
    assert processes._last_seen(0).startswith("at step 13, ")


def test_a_rank_that_makes_no_progress_is_lost(store, own, monkeypatch):
    monkeypatch.setattr(watch, "TIMEOUT", timedelta(seconds=0))
    # Never more than three times this: a rank that was held up itself says nothing about the others.
    monkeypatch.setattr(watch, "WATCH_SECONDS", 1e-9)
    clock = iter(range(100))
    monkeypatch.setattr(watch.time, "monotonic", lambda: 2e-9 * next(clock))
    own._looked = 0.0
    for step in range(5):
        store.set("sparsary/beat/1", f"0 step {step}")
        own.beat("unit 4")
    with pytest.raises(RanksLostError, match="rank 1 made no progress"):
        own.beat("unit 4")


def test_a_rank_that_was_held_up_accuses_nobody(store, own, monkeypatch):
    monkeypatch.setattr(watch, "TIMEOUT", timedelta(seconds=5))
    monkeypatch.setattr(watch, "WATCH_SECONDS", 1.0)
    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    own._looked = 0.0
    for now[0] in (2.0, 900.0, 902.0, 904.0):
        own.beat("unit 4")
    now[0] = 906.0
    with pytest.raises(RanksLostError):
        own.beat("unit 4")


def test_waiting_returns_what_the_call_does(store, own):
    assert own.wait(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        own.wait(lambda: 1 / 0)


def test_a_waiting_rank_hears_that_it_must_stop(store, own):
    never = threading.Event()
    threading.Timer(0.05, lambda: store.set(processes.HEED, "15")).start()
    with pytest.raises(Stopped):
        own.wait(never.wait)
    never.set()


def test_alone_only_the_own_signal_counts(own):
    own.beat("unit 4")
    assert own.wait(lambda: 7) == 7
    own.stop.signal_number = 2
    with pytest.raises(Stopped):
        own.beat("unit 4")
