"""However a run ends, no process of it is left behind; test_train.py looks at a clean exit."""

import os
import signal
import time

from helpers import write_jsonl
from processes import PATIENCE_S, marked, nothing_left, start

from sdft_dist.lab import world
from sdft_dist.lab.base import shipped_base
from sdft_dist.recipe import parse_config


def lab_config(folder, *, steps, scorer="sdft_dist.lab.world:score"):
    rows = write_jsonl(folder / "train.jsonl", [row._asdict() for row in world.rows("t35", "a", 32, seed=0)])
    return parse_config(
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


def test_an_exception(tmp_path):
    process, mark = start(lab_config(tmp_path, steps=2, scorer="failing_scorer:score"), tmp_path)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "the user's scorer failed" in output
    assert nothing_left(mark)


def test_ctrl_c(tmp_path):
    process, mark = start(lab_config(tmp_path, steps=100_000), tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE_S
    while not (metrics.exists() and metrics.read_text().count('"train"') >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.5)
    assert len(marked(mark)) > 4, "Ray, a generator, a teacher and a learner must be running"
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends: to the whole foreground group
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, output
    assert "sdft: interrupted" in output
    assert nothing_left(mark)
