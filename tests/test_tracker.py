"""Weights & Biases: the real package, offline."""

import os
import re
import subprocess
import sys
from contextlib import suppress

import pytest
from helpers import config_of

from sdft_dist.errors import Fault, Preempted, UserError
from sdft_dist.runlog import RunLog
from sdft_dist.tracker import tracked

wandb = pytest.importorskip("wandb")
PROGRAM = """
import sys
from pathlib import Path
from sdft_dist.config import Config
from sdft_dist.recipe import parse
from sdft_dist.tracker import tracked
config = parse(Config, {"model": {"path": "m"}, "data": {"train": "d"}, "wandb": "project"})
with tracked(config, Path(sys.argv[1]), print):
    print("on", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def attempts(folder):
    """Of each one the file that would be uploaded, and its numbers by name, as W&B's protocol buffers have them: a key
    and then field 16, text of JSON after its length."""
    logs = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [(path.name, set(numbers(path.read_bytes()))) for path in logs]


def numbers(data):
    for found in re.finditer(rb"((?:train|eval)/[a-z]+)\x82\x01(.)", data, re.S):
        yield found[1].decode(), float(data[found.end() : found.end() + found[2][0]])


def test_numbers_of_all_records_get_there_and_attempts_are_one_run(tmp_path):
    config = config_of(wandb="team/project")
    for _ in range(2):
        with tracked(config, tmp_path, print) as track, RunLog(tmp_path, title="", track=track) as log:
            log.write("train", 1, {"loss": 0.5, "bins": [1.0]})
            log.write("eval", 1, {"new": 0.25})
            log.write("train", 2, {"loss": 0.375})
            log.write("train", 1, {"loss": 9.0})  # as after a restart
    (one, told), (two, same) = attempts(tmp_path)
    assert one == two
    assert told == same == {("train/loss", 0.5), ("eval/new", 0.25), ("train/loss", 0.375)}


def test_what_fails_on_the_way_is_told_once_and_ends_nothing(tmp_path, monkeypatch):
    said = []
    with tracked(config_of(wandb="project"), tmp_path, said.append) as track:
        monkeypatch.setattr(type(wandb.run), "log", lambda *args, **kwargs: {}["gone"])
        track("train", 1, {"loss": 0.5})
        track("train", 2, {"loss": 0.5})
    assert said == ["wandb: 'gone': gets nothing any more; metrics.jsonl has everything"]


@pytest.mark.parametrize(
    ("end", "told"), [(None, [0]), (Preempted("asked to stop"), ["preempted", 1]), (Fault("a disk"), [1])]
)
def test_how_a_run_has_ended_is_told(tmp_path, monkeypatch, end, told):
    found = []
    with suppress(Preempted, Fault), tracked(config_of(wandb="project"), tmp_path, print):
        kind, finish = type(wandb.run), wandb.run.finish
        monkeypatch.setattr(kind, "mark_preempting", lambda self: found.append("preempted"))
        monkeypatch.setattr(kind, "finish", lambda self, exit_code: (found.append(exit_code), finish(exit_code)))
        if end is not None:
            raise end
    assert found == told


@pytest.mark.parametrize(
    ("error", "kind"), [(wandb.errors.UsageError, UserError), (wandb.errors.CommError, Fault)], ids=["key", "server"]
)
def test_who_is_not_logged_in_is_told_so_before_the_start(tmp_path, monkeypatch, error, kind):
    def init(**options):
        raise error("It went wrong.\nConsider this.")

    monkeypatch.setattr(wandb, "init", init)
    with (
        pytest.raises(kind, match=r"^wandb: It went wrong\. Or set WANDB_MODE=offline, and `wandb sync` later$"),
        tracked(config_of(wandb="project"), tmp_path, print),
    ):
        pass


def test_no_process_outlives_a_run_that_is_killed(tmp_path):
    import psutil

    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], env=env, **pipes) as run:
        assert run.stdout.readline() == b"on\n"
        children = psutil.Process(run.pid).children(recursive=True)
        run.kill()
    assert children
    assert psutil.wait_procs(children, timeout=20)[1] == []
