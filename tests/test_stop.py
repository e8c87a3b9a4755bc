"""What a run is told is not forgotten, whenever it is told."""

import os
import signal

import pytest

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


def test_sigterm_is_what_ctrl_c_is():
    before, heard = signal.getsignal(signal.SIGTERM), []
    # Tune's handler takes this place; in a shell's background there is none.
    interrupt = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with stop.sigterm_as_ctrl_c():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert heard == [signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) is before
