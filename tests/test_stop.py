"""What a run is told is not forgotten, whenever it is told."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest
import ray

from sdft_dist import stop


@pytest.fixture
def always_looking(monkeypatch):
    monkeypatch.setattr(stop, "LOOK_S", -1.0)


def test_a_signal_that_comes_while_nodes_are_looked_at_is_kept(monkeypatch, always_looking):
    def look():
        os.kill(os.getpid(), signal.SIGTERM)
        return set()

    monkeypatch.setattr(stop, "leaving_nodes", look)
    before = signal.getsignal(signal.SIGTERM)
    with stop.asked_to_stop() as asked:
        assert asked()
        assert asked()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_node_that_leaves_is_told_of_once_and_for_all(monkeypatch, always_looking):
    answers = iter([set(), {"a node"}])
    monkeypatch.setattr(stop, "leaving_nodes", lambda: next(answers))
    with stop.asked_to_stop() as asked:
        assert [asked() for _ in range(3)] == [False, True, True]


def test_nodes_of_the_run_s_actors_and_of_the_driver_itself_count(monkeypatch):
    actors = {"a": {"Address": {"NodeID": "an actor's"}}, "b": {"Address": {"NodeID": "another that stays"}}}
    draining = {"an actor's": 0, "the driver's": 0, "of another run": 0}
    here = SimpleNamespace(get_job_id=lambda: "01000000", get_node_id=lambda: "the driver's")
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.util.get_current_placement_group", lambda: None)
    monkeypatch.setattr("ray.get_runtime_context", lambda: here)
    monkeypatch.setattr("ray._private.state.actors", lambda **_: actors)
    monkeypatch.setattr("ray._private.state.state", SimpleNamespace(get_draining_nodes=lambda: draining))
    assert stop.leaving_nodes() == {"an actor's", "the driver's"}


def test_a_reason_of_the_caller_s_counts_too_and_nodes_need_ray(always_looking):
    answers = iter([False, True])
    with stop.asked_to_stop(also=lambda: next(answers)) as asked:
        assert [asked() for _ in range(3)] == [False, True, True]


def test_the_signal_is_taken_over_again_from_whoever_took_it():
    """As Ray does when it starts, and when it ends, after which it would kill."""
    before = signal.getsignal(signal.SIGTERM)
    with stop.sigterm_told() as told:
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        assert not told()
        os.kill(os.getpid(), signal.SIGTERM)
        assert told()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_is_what_the_caller_makes_of_it():
    heard = []
    with stop.sigterm_told(again=lambda: heard.append("again")) as told:
        for expected in ([], ["again"]):
            os.kill(os.getpid(), signal.SIGTERM)
            assert told()
            assert heard == expected


def test_ray_s_start_leaves_the_signal_alone_until_the_end_of_the_block():
    before = signal.getsignal(signal.SIGTERM)

    def taken():
        with pytest.raises(RuntimeError, match="nowhere does not exist"):  # for which it takes the signal first
            ray.init("nowhere://")
        return signal.getsignal(signal.SIGTERM)

    try:
        with stop.sigterm_told():
            mine = signal.getsignal(signal.SIGTERM)
            assert taken() is mine
        assert taken() not in (mine, before)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_signals_are_left_alone():
    found = []

    def look():
        with stop.sigterm_told() as told:
            found.append((told(), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(False, before)]
