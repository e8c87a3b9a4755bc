"""What a run prints where no progress bar is seen, as in a batch system's log."""

import io

import pytest
from rich.console import Console

from sdft_dist import runlog
from sdft_dist.runlog import RunLog

RECORD = {"loss": 0.5, "cut_share": 0.0, "empty_share": 0.0, "grad_norm": 1.0}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(runlog.time, "monotonic", clock)
    return clock


def lines(tmp_path, clock, act, **terminal):
    out = io.StringIO()
    console = Console(file=out, get_time=clock, width=200, **terminal)
    with RunLog(tmp_path, title="sdft", console=console) as log:
        act(log)
    return out.getvalue().splitlines()


def test_steps_are_told_now_and_then_and_what_happens_at_once(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(runlog, "item_metrics", lambda step, items: {"completion_tokens_mean": 9.0})

    def act(log):
        log.say("starting")
        for step in range(1, 7):
            clock.now += 12
            log.step(step, 6, RECORD, [])
            log.say(f"{step} judged", now=False)
        log.say("lost generators 0")
        log.evaluation(6, {"new": 0.5, "new_interval": [0.4, 0.6], "new_cut_share": 0.0})

    assert lines(tmp_path, clock, act) == [
        "sdft: starting",
        "sdft: step 3 of 6: loss 0.5000 len 9 0/s, 0:00:36 left",
        "sdft: step 6 of 6: loss 0.5000 len 9 0/s",
        "sdft: lost generators 0",
        "sdft: step 6: new 50.0%",
    ]


def test_the_time_left_is_told_of_long_steps_too(tmp_path, clock, monkeypatch):
    """Rich's own pace is that of the last half minute."""
    monkeypatch.setattr(runlog, "item_metrics", lambda step, items: {"completion_tokens_mean": 9.0})

    def act(log):
        for step in (501, 502, 503):  # as after --resume
            clock.now += 100
            log.step(step, 600, RECORD, [])

    assert lines(tmp_path, clock, act)[-1].endswith(", 2:41:40 left")


def test_where_a_bar_is_seen_there_are_no_lines(tmp_path, clock):
    told = lines(tmp_path, clock, lambda log: log.say("starting"), force_terminal=True, force_interactive=False)
    assert not any("sdft: starting" in line for line in told)
