"""The lab's sweep of twelve runs, whose driver is killed twice.

`PYTHONPATH=tests python tests/e2e/killed_sweep.py FOLDER` takes 13 minutes, less with `--steps 40` for shorter runs. It
kills when three and eight trials are done and another is past its first checkpoint, looks what is left of it, and
gives the same command again. Prints for each trial how many attempts it took and that every step was done once.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from processes import MARK, marked

from sdft_dist.lab.base import shipped_base
from sdft_dist.lab.teaching import write_sweep
from sdft_dist.recipe import dump_config, load_config
from sdft_dist.runlog import read_metrics
from sdft_dist.sweep.space import load_sweep
from sdft_dist.sweep.trials import trials

KILL_AT = (3, 8)  # trials done
GONE_S = 120  # in which Ray's own processes notice that the driver is gone


def in_the_middle(trial):
    """Whether a trial that is not done has a checkpoint to go on from."""
    return trial.state == "running" and any((trial.run / "checkpoints").glob("step-*/COMMITTED"))


def main(folder: Path, steps: int) -> None:
    """Run, kill, run, kill, run."""
    sheet = write_sweep(folder, shipped_base())
    every = steps // 4
    recipe = load_config(folder / "recipe.yaml", [f"steps={steps}", f"eval.every={every}", f"checkpoint.every={every}"])
    (folder / "recipe.yaml").write_text(dump_config(recipe))
    mark, found = uuid.uuid4().hex, trials(load_sweep(sheet))
    command = [sys.executable, "-m", "sdft_dist.cli", "sweep", str(sheet)]
    for target in (*KILL_AT, None):
        driver = subprocess.Popen(command, env=os.environ | {MARK: mark})
        while target is not None:
            time.sleep(0.5)
            assert driver.poll() is None, "it ended before it was killed"
            if sum(trial.state == "finished" for trial in found) >= target and any(map(in_the_middle, found)):
                os.kill(driver.pid, signal.SIGKILL)
                break
        code, deadline = driver.wait(), time.monotonic() + GONE_S
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(1)
        done = sum(trial.state == "finished" for trial in found)
        print(f"ended with {code}: {done} of {len(found)} done, {len(marked(mark))} processes left", flush=True)
    for trial in found:
        attempts = len(list((trial.run / "attempts").iterdir()))
        steps = [record["step"] for record in read_metrics(trial.run, "train")]
        assert steps == list(range(1, len(steps) + 1)), "every step counts once"
        print(f"{trial.name}: {trial.state}, attempts {attempts}, steps {len(steps)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    main(args.folder, args.steps)
