"""The timeline's file: bounded, and whole at any end."""

import json

from sdft_dist.trace import Trace
from sdft_dist.types import Span


def test_a_trace_ends_before_it_fills_the_disk_and_opens_still(tmp_path):
    trace = Trace(tmp_path / "trace.json", most_bytes=1000)
    for i in range(1000):
        trace.add("learner", 0, Span("train", float(i), i + 0.5))
    trace.close()
    events = json.loads((tmp_path / "trace.json").read_text())
    assert 5 < len(events) < 15
    assert events[1]["name"] == "train"


def test_a_trace_of_a_killed_run_is_whole_but_for_its_end(tmp_path):
    trace = Trace(tmp_path / "trace.json")
    trace.add("learner", 0, Span("train", 1.0, 1.5))
    trace._file.flush()
    (header, event) = (tmp_path / "trace.json").read_text().removeprefix("[\n").strip().splitlines()
    assert json.loads(header.rstrip(","))["args"] == {"name": "learner"}
    assert json.loads(event.rstrip(","))["dur"] == 500_000
