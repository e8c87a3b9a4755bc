import json

import pytest
from test_report import a_run

from sdft_dist.errors import UserError
from sdft_dist.files import read_jsonl
from sdft_dist.recipe import dump_config, load_config
from sdft_dist.rundir import RunDir
from sdft_dist.status import show, status


def test_a_run_tells_how_far_it_is(tmp_path):
    run = a_run(tmp_path / "one")
    (run / "run.log").write_text("2026-01-01 00:00:00 sdft begins\n2026-01-01 00:01:00 committed step-000003\n")
    found = status(run)
    assert (found["state"], found["step"], found["steps"]) == ("not running", 3, 40)
    assert found["minutes_left"] == pytest.approx(37 * 5.0 / 60), "with what is between the steps"
    assert found["evaluation"] == {"step": 3, "new": 1.0, "old": 0.5}
    assert found["log"][-1].endswith("committed step-000003")
    assert json.loads(json.dumps(found)) == found
    assert "samples per s     4" in show(found)
    assert "evaluation        new 100.0%, old 50.0% (step 3)\n" in show(found)


def test_who_writes_into_it_is_named(tmp_path):
    run = RunDir(a_run(tmp_path / "one"))
    run._take_lock()
    assert status(run.path)["state"].startswith("running (process ")
    run.release()
    (run.path / "model").mkdir()
    assert status(run.path)["state"] == "finished"


def test_a_run_that_stopped_early_has_no_time_left(tmp_path):
    run = a_run(tmp_path / "one")
    (run / "model").mkdir()
    found = status(run)
    assert (found["state"], found["step"], found["steps"]) == ("finished", 3, 40)
    assert "minutes_left" not in found


def test_settings_are_the_newest_attempts_after_a_thousand_too_and_metrics_are_read_once(tmp_path, monkeypatch):
    run, reads = RunDir(a_run(tmp_path / "one")), []
    config = load_config(run.path / "config.yaml")
    for number in ("998", "999-copy"):
        (run.path / "attempts" / number).mkdir(parents=True)
        (run.path / "attempts" / number / "config.yaml").write_text(dump_config(config))
    for steps in (50, 60):
        attempt = run.new_attempt(config.changed(steps=steps))
    assert attempt.name == "1000"
    monkeypatch.setattr("sdft_dist.status.read_jsonl", lambda path: reads.append(path) or read_jsonl(path))
    assert status(run.path)["steps"] == 60
    assert len(reads) == 1


def test_a_line_that_is_being_written_is_left_for_later(tmp_path):
    run = a_run(tmp_path / "one")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert status(run)["step"] == 3


def test_a_run_that_has_just_begun_and_a_folder_that_is_none(tmp_path):
    run = a_run(tmp_path / "one")
    (run / "metrics.jsonl").unlink()
    assert status(run)["step"] == 0
    with pytest.raises(UserError, match="is not a run directory"):
        status(tmp_path)


def test_a_finished_run_that_goes_back_is_not_finished_any_more(tmp_path):
    run = RunDir(a_run(tmp_path / "one"))
    (run.path / "model").mkdir()
    assert status(run.path)["state"] == "finished"
    run.rewind(2)
    assert (status(run.path)["state"], status(run.path)["step"]) == ("not running", 2)
    assert status(run.path)["evaluation"]["step"] == 0
