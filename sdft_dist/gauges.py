"""What a run tells Prometheus through Ray's own metrics: `ray_sdft_…`, with the end of the run directory as `run`.

Ray exports them on each node where its dashboard's extras are installed (`ray[default]`); elsewhere this does nothing.
`deploy/grafana/sdft.json` shows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STEP = {  # of a step's record in metrics.jsonl, by their names there
    "step": "Optimizer steps done",
    "loss": "Weighted loss of the last step",
    "divergence_per_token": "Mean divergence of teacher and student, nats",
    "grad_norm": "Global gradient norm before clipping",
    "learning_rate": "Learning rate of the last step",
    "samples_per_s": "Samples trained on per second",
    "trained_tokens_per_s": "Completion tokens trained on per second",
    "completion_tokens_mean": "Mean length of a completion, tokens",
    "cut_share": "Share of completions cut at the limit",
    "staleness_mean": "Mean lag of samples behind the student, steps",
    "staleness_max": "Largest lag of a sample behind the student, steps",
    "pushed_mib": "Weights pushed to all engines before the step, MiB",
    "skipped": "1 where the step was left out because it was no finite number",
}
PLACES = ("decoding", "unscored", "scoring", "scored")
ROLES = ("generator", "teacher")


class Gauges:
    """One set of Ray metrics for the run `name`, which is escaped where it is not ASCII: Ray takes no other tags. Needs
    Ray."""

    def __init__(self, name: str) -> None:
        from ray.util.metrics import Gauge

        self._tags = {"run": name.encode("ascii", "backslashreplace").decode()}
        self._step = {key: Gauge(f"sdft_{key}", text, ("run",)) for key, text in STEP.items()}
        self._queue = Gauge("sdft_queue_samples", "Samples under way, by where they are", ("run", "place"))
        self._version = Gauge("sdft_weights_version", "Optimizer steps in the weights last pushed", ("run", "role"))

    def set(self, record: Mapping[str, Any], queues: Mapping[str, int], versions: Mapping[str, int]) -> None:
        """After a step: its record, the samples at each of PLACES, and the version that each of ROLES serves."""
        rate = record["trained_tokens"] / max(1e-9, record["time/step"])
        for key, gauge in self._step.items():
            value = rate if key == "trained_tokens_per_s" else record.get(key)
            if value is not None:
                gauge.set(float(value), self._tags)
        for place in PLACES:
            self._queue.set(queues[place], self._tags | {"place": place})
        for role in ROLES:
            self._version.set(versions[role], self._tags | {"role": role})
