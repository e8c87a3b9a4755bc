"""However a run ends, no process of it is left behind.

Every process of a run inherits a mark in its environment; /proc tells who still carries it.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from helpers import write_jsonl

from sdft_dist.config import dump_config, parse_config
from sdft_dist.lab import world
from sdft_dist.lab.base import shipped_base

MARK = "SDFT_TEST_MARK"


def marked(value):
    """Pids whose environment carries the mark."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                environment = (folder / "environ").read_bytes()
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if f"{MARK}={value}".encode() in environment and command:
                found.append((int(folder.name), command.replace(b"\0", b" ")[:80].decode(errors="replace")))
    return found


def start(folder, *, steps, scorer="sdft_dist.lab.world:score"):
    rows = write_jsonl(folder / "train.jsonl", [row._asdict() for row in world.rows("t35", "a", 32, seed=0)])
    config = parse_config(
        {
            "run_dir": str(folder / "run"),
            "steps": steps,
            "model": {"path": str(shipped_base()), "max_length": 64},
            "data": {"train": str(rows)},
            "prompt": {"template": world.TEACHER_TEMPLATE},
            "rollout": {"prompts_per_step": 4, "max_completion_tokens": 12},
            "learner": {"tokens_per_microbatch": 256},
            "eval": {"every": 2, "sets": {"new": str(rows)}, "scorer": scorer},
        }
    )
    (folder / "recipe.yaml").write_text(dump_config(config))
    mark = uuid.uuid4().hex
    environment = os.environ | {MARK: mark, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "sdft_dist.cli", "train", str(folder / "recipe.yaml")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    return process, mark


def nothing_left(mark, within_s=20):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not marked(mark):
            return True
        time.sleep(0.5)
    pytest.fail(f"left behind: {marked(mark)}")


def test_a_clean_exit(tmp_path):
    process, mark = start(tmp_path, steps=2)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "Trained model:" in output
    assert nothing_left(mark)


def test_an_exception(tmp_path):
    process, mark = start(tmp_path, steps=2, scorer="failing_scorer:score")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "the user's scorer failed" in output
    assert nothing_left(mark)


def test_ctrl_c(tmp_path):
    process, mark = start(tmp_path, steps=100_000)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 150
    while not (metrics.exists() and metrics.read_text().count('"train"') >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.5)
    assert len(marked(mark)) > 4, "Ray, a generator, a teacher and a learner must be running"
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends: to the whole foreground group
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "sdft: interrupted" in output
    assert nothing_left(mark)
