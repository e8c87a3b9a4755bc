"""An engine that is lost between two evaluations costs no optimizer step."""

from pathlib import Path

import pytest
from helpers import write_jsonl
from processes import ended, lab_config, nothing_left, start

from sdft_dist.lab import world
from sdft_dist.runlog import read_metrics


@pytest.mark.fault("generator killed before an evaluation", "SIGKILL", "replaced, given the student, asked again")
def test_an_evaluation_puts_a_lost_generator_right(tmp_path):
    """Of plain fine-tuning, whose generators only evaluate and get the student only for that."""
    rows = [{"prompt": row.prompt, "answer": row.answer} for row in world.rows("t35", "a", 8, seed=1)]
    held = str(write_jsonl(tmp_path / "held.jsonl", rows))
    evaluation = {"every": 2, "sets": {"new": held}, "scorer": "killing_scorer:score"}
    config = lab_config(tmp_path, method="sft", steps=3, eval=evaluation)
    process, mark = start(config, tmp_path)
    ended(process)
    run = Path(config.run_dir)
    assert [m["step"] for m in read_metrics(run, "train")] == [1, 2, 3]
    assert [m["step"] for m in read_metrics(run, "eval")] == [0, 2, 3]
    log = (run / "run.log").read_text()
    assert "lost generators 0" in log
    assert "generators serve version 2 again" in log
    assert "starting anew" not in log
    pushed = [m["pushed_mib"] for m in read_metrics(run, "train")]
    assert pushed[1] == 0 < pushed[0], "no push where no evaluation was due"
    assert nothing_left(mark)
