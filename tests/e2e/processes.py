"""A run on the lab in a process of its own, and who of it is still there.

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
from helpers import config_of, write_jsonl

from sdft_dist.lab import world
from sdft_dist.lab.base import shipped_base
from sdft_dist.recipe import dump_config

MARK = "SDFT_TEST_MARK"
# For whatever must happen at last. What takes 20 s here has taken 200 s where others used the machine: only a hang
# should need as long as this.
PATIENCE_S = 400


def lab_config(folder, **sections):
    """A small run on the lab's base, in `folder`/run; sections are merged over the defaults."""
    rows = [row._asdict() for row in world.rows("t35", "a", 64, seed=0)]
    tree = {
        "run_dir": str(folder / "run"),
        "steps": 4,
        "model": {"path": str(shipped_base()), "max_length": 64},
        "data": {"train": str(write_jsonl(folder / "train.jsonl", rows))},
        "prompt": {"template": world.TEACHER_TEMPLATE},
        "rollout": {"prompts_per_step": 8, "max_completion_tokens": 12},
        "optim": {"learning_rate": 1e-4, "schedule": "constant", "warmup_steps": 0},
        "learner": {"tokens_per_microbatch": 256},
        "cluster": {"timeout_s": PATIENCE_S},
    }
    return config_of(tree, **sections)


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


def start(config, folder, *options, mark=None):
    """`sdft train` on `config` in a process group of its own, and the mark that its processes carry."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(dump_config(config))
    mark = mark or uuid.uuid4().hex
    environment = os.environ | {MARK: mark, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "sdft_dist.cli", "train", str(recipe), *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True,
        # Where the tests run in the background of a shell, SIGINT is ignored, and that would be inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    return process, mark


def ended(process, code=0, within_s=PATIENCE_S):
    """What a process has said that ends by itself, with this exit code."""
    output, _ = process.communicate(timeout=within_s)
    assert process.returncode == code, output
    return output


def nothing_left(mark):
    """True as soon as no process carries the mark; fails after a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not marked(mark):
            return True
        time.sleep(0.5)
    pytest.fail(f"left behind: {marked(mark)}")
