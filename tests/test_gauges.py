"""What Prometheus is told, and that the dashboard asks for nothing else."""

import json
import re
from pathlib import Path

from actors.stream import Stream
from sdft_dist.gauges import PLACES, ROLES, STEP, Gauges
from sdft_dist.remote import Events

DASHBOARD = json.loads((Path(__file__).parent.parent / "deploy" / "grafana" / "sdft.json").read_text())


MADE = {}


class Recorded:
    """Ray's Gauge, without Ray."""

    def __init__(self, name, description, tag_keys):
        self.values, self.tags = {}, tag_keys
        MADE[name] = self

    def set(self, value, tags):
        assert set(tags) == set(self.tags)
        self.values[tuple(tags.values())] = value


def told(monkeypatch, record, name="one"):
    import ray.util.metrics

    monkeypatch.setattr(ray.util.metrics, "Gauge", Recorded)
    MADE.clear()
    queues, versions = {place: i for i, place in enumerate(PLACES)}, dict.fromkeys(ROLES, 7)
    Gauges(name).set(record, queues, versions)
    return {name: gauge.values for name, gauge in MADE.items()}


def test_every_step_is_told(monkeypatch):
    record = dict.fromkeys(STEP, 1.0) | {"trained_tokens": 300, "time/step": 0.5, "more": [1]}
    found = told(monkeypatch, record)
    assert found["sdft_loss"] == {("one",): 1.0}
    assert found["sdft_trained_tokens_per_s"] == {("one",): 600.0}
    assert found["sdft_queue_samples"] == {("one", place): i for i, place in enumerate(PLACES)}
    assert found["sdft_weights_version"] == {("one", role): 7 for role in ROLES}
    assert all(values for values in found.values())


def test_what_a_method_does_not_measure_is_left_out(monkeypatch):
    found = told(monkeypatch, {"loss": 1.0, "trained_tokens": 1, "time/step": 1.0})
    assert found["sdft_staleness_mean"] == {}


def test_a_run_of_any_name_is_told_in_ascii(monkeypatch):
    """Ray's own metrics take no other tags."""
    Gauges("läufe/日本").set(
        {"trained_tokens": 1, "time/step": 1.0, "loss": 1.0}, dict.fromkeys(PLACES, 0), dict.fromkeys(ROLES, 0)
    )
    found = told(monkeypatch, {"loss": 1.0, "trained_tokens": 1, "time/step": 1.0}, "läufe/日本\udcff")
    assert found["sdft_loss"] == {(r"l\xe4ufe/\u65e5\u672c\udcff",): 1.0}
    assert all(run.isascii() for values in found.values() for run, *_ in values)


def test_queues_are_by_the_places_that_are_told():
    class Pool:
        actors, lost = (), {}

    stream = Stream(
        Pool(), Pool(), Events(), slice_s=None, max_call_tokens=1, target_bytes=1, max_bytes=1, timeout_s=1,
        on_span=lambda *_: None,
    )  # fmt: skip
    assert tuple(stream.queues()) == PLACES


def test_the_dashboard_asks_for_what_is_told():
    known = {f"ray_sdft_{name}" for name in [*STEP, "queue_samples", "weights_version"]}
    asked = {
        name
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
        for name in re.findall(r"ray_\w+", target["expr"])
    }
    assert asked <= known
    assert known - asked == {"ray_sdft_loss", "ray_sdft_learning_rate"}
    assert DASHBOARD["templating"]["list"][1]["query"] == "label_values(ray_sdft_step, run)"
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]]
    assert len(set(places)) == len(places), "panels lie beside one another"
