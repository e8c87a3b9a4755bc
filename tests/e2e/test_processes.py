"""However a run ends, no process of it is left behind; test_train.py looks at a clean exit."""

import os
import signal

from chaos import wait_for_step
from processes import ended, lab_config, marked, nothing_left, start


def evaluated(folder, *, steps, scorer="sdft_dist.lab.world:score"):
    rows = {"new": str(folder / "train.jsonl")}
    return lab_config(folder, steps=steps, eval={"every": 2, "sets": rows, "scorer": scorer})


def test_an_exception(tmp_path):
    process, mark = start(evaluated(tmp_path, steps=2, scorer="failing_scorer:score"), tmp_path)
    output = ended(process, 1)
    assert "the user's scorer failed" in output
    assert nothing_left(mark)


def test_ctrl_c(tmp_path):
    process, mark = start(evaluated(tmp_path, steps=100_000), tmp_path)
    wait_for_step(tmp_path / "run", 3, process)
    assert len(marked(mark)) > 4, "Ray, a generator, a teacher and a learner must be running"
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends: to the whole foreground group
    output = ended(process, 130)
    assert f"sdft: interrupted\n{tmp_path / 'run'}: no step is saved" in output
    assert nothing_left(mark)
