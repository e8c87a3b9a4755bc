"""A run in a process of its own, and who of it is still there.

Every process of a run inherits a mark in its environment; /proc tells who still carries it.
"""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from sdft_dist.config import dump_config

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


def start(config, folder):
    """`sdft train` on `config` in a process group of its own, and the mark that its processes carry."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(dump_config(config))
    mark = uuid.uuid4().hex
    environment = os.environ | {MARK: mark, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "sdft_dist.cli", "train", str(recipe)],
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
