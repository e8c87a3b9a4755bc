"""Ray's own exporter serves what a run tells; needs the extra `metrics` (ray[default])."""

import os
import socket
import subprocess
import sys

import pytest
from processes import PATIENCE_S

PROGRAM = """
import time, urllib.request
import ray
from sdft_dist.gauges import PLACES, ROLES, STEP, Gauges
ray.init(address="local", include_dashboard=False, _metrics_export_port={port}, logging_level="ERROR", num_cpus=1)
record = dict.fromkeys(STEP, 1.5) | {{"trained_tokens": 300, "time/step": 0.5}}
Gauges("one").set(record, dict.fromkeys(PLACES, 4), dict.fromkeys(ROLES, 7))
for _ in range(60):
    time.sleep(1)
    try:
        text = urllib.request.urlopen("http://127.0.0.1:{port}/metrics", timeout=3).read().decode()
    except OSError:
        continue
    lines = [line for line in text.splitlines() if line.startswith("ray_sdft_")]
    if lines:
        print("\\n".join(lines))
        break
"""


def test_prometheus_finds_every_metric():
    pytest.importorskip("opencensus", reason="the extra `metrics` is not installed")
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(port=port)],
        env=os.environ, capture_output=True, text=True, timeout=PATIENCE_S, check=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if 'run="one"' in line]
    value = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert value["ray_sdft_loss"] == 1.5
    assert value["ray_sdft_trained_tokens_per_s"] == 600
    assert sum("ray_sdft_queue_samples{" in line and 'place="scored"' in line for line in lines) == 1
    assert sum('role="teacher"' in line and line.endswith(" 7.0") for line in lines) == 1
