"""The page about runs; the runs are made up."""

import json
import re

import pytest
from test_rundir import config_in

from sdft_dist.config import dump_config
from sdft_dist.errors import UserError
from sdft_dist.evaluate import Judged
from sdft_dist.report import report
from sdft_dist.rundir import RunDir


def a_run(folder, method="sdft", rate=1e-5, kept=0.5, evaluated=True, start="m"):
    sets = {"new": "n", "old": "o"} if evaluated else {}
    config = config_in(folder, method=method, optim={"learning_rate": rate}, eval={"sets": sets}, model={"path": start})
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    lines = [
        {"kind": "train", "step": step, "loss": 1 / step, "grad_norm": 1.0, "completion_tokens_mean": 9.0, "samples": 8,
         "samples_per_s": 4.0, "time/step": 2.0, "busy/learner/train": 1.0, "divergence_by_position": [0.5, None, 0.1]}
        for step in (1, 2, 3)
    ]  # fmt: skip
    run = RunDir(folder)
    if evaluated:
        run.note_evaluation(0, {"new": [Judged("hm", "yes", False, "<b>q</b>")], "old": [Judged("a", "a", True)]})
        run.note_evaluation(3, {"new": [Judged("<script>x</script>", "yes", True)], "old": [Judged("b", "a", False)]})
        lines.insert(0, {"kind": "eval", "step": 0, "new": 0.0, "old": 1.0, "new_interval": [0.0, 0.2]})
        lines.append({"kind": "eval", "step": 3, "new": 1.0, "old": kept})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_two_runs_are_compared_on_one_page(tmp_path):
    one, other = a_run(tmp_path / "one"), a_run(tmp_path / "other", "sft", rate=2e-5, kept=0.25)
    page = report([one, other], tmp_path / "out").read_text()
    assert not re.search(r"(src|href)=(?!\"data:)", page), "self-contained"
    assert "<script" not in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    for shown in ("0.0% (0 – 20)", "100.0%", "50.0%", "25.0%", "optim.learning_rate", "1e-05", "2e-05"):
        assert shown in page
    assert "<td>run_dir</td>" in page, "settings that differ"
    assert "<td>seed</td>" not in page
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert {"pareto.png", "new.png", "others--mean.png", "loss.png", "time.png"} <= pictures
    assert page.count("data:image/png;base64,") == len(pictures)


def test_runs_that_go_on_from_each_other_give_a_matrix_of_what_each_stage_kept(tmp_path):
    one = a_run(tmp_path / "one")
    two = a_run(tmp_path / "two", start=str(one / "model"))
    page = report([two, one], tmp_path / "out").read_text()
    assert "What each stage kept" in page
    assert "one → two: accuracy" in page
    assert (tmp_path / "out" / "retention-two.png").exists()


def test_a_run_that_was_never_evaluated(tmp_path):
    page = report([a_run(tmp_path / "one", evaluated=False)], tmp_path / "out").read_text()
    assert "None was measured" in page
    assert not (tmp_path / "out" / "pareto.png").exists()


def test_runs_of_one_name_are_told_apart(tmp_path):
    page = report([a_run(tmp_path / "a" / "run"), a_run(tmp_path / "b" / "run")], tmp_path / "out").read_text()
    assert "a/run" in page
    assert "b/run" in page


def test_what_cannot_be_shown_is_said(tmp_path):
    run = a_run(tmp_path / "one")
    with pytest.raises(UserError, match="expected one of the held-out sets: new, old"):
        report([run], tmp_path / "out", new="neu")
    with pytest.raises(UserError, match="is not a run directory"):
        report([tmp_path], tmp_path / "out")
    report([run], tmp_path / "out")
    with pytest.raises(UserError, match="already in use"):
        report([run], tmp_path / "out")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="nothing was trained yet"):
        report([run], tmp_path / "again")
