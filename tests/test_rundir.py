"""Who may write into a run's folder, and where a run begins."""

import json
import shutil
import threading
from pathlib import Path

import pytest
from helpers import config_of
from test_commits import FakeSaver

from sdft_dist.errors import ConfigError, Fault, UserError
from sdft_dist.evaluate import Judged
from sdft_dist.fingerprint import fingerprint
from sdft_dist.rundir import RunDir, Start


def config_in(folder, **sections):
    return config_of(run_dir=str(folder), **({"steps": 40} | sections))


def claim(config, resume=None, *, allow_changes=False):
    facts = {"fingerprint": fingerprint(config, [])}
    return RunDir.claim(config, resume, facts, allow_changes=allow_changes)


@pytest.fixture
def finished(tmp_path):
    """A run with checkpoints of steps 10 and 20 and metrics up to step 23, of which the last is cut."""
    config = config_in(tmp_path / "run")
    run, start = claim(config)
    assert start == Start()
    for step in (10, 20):
        saver = FakeSaver()
        run.commits.start(saver, step)
        run.commits.finish(saver, wait=True)
    lines = [json.dumps({"kind": "train", "step": step}) for step in range(1, 23)]
    (run.path / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "tr']))
    run.release()
    return config


def test_a_used_folder_is_refused_with_what_to_do(finished):
    with pytest.raises(UserError, match="already in use: go on from step 20 with --resume auto, or give another"):
        claim(finished)


def test_resume_auto_begins_at_the_newest_and_forgets_later_metrics(finished):
    run, start = claim(finished, "auto")
    assert start == Start(20, run.commits.path(20))
    with (run.path / "metrics.jsonl").open("a") as log:  # as whoever goes on has it open
        run.rewind(start.step)
        log.write('{"kind": "train", "step": 21}\n')
    steps = [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 22))


def test_a_finished_run_whose_checkpoints_were_removed_is_not_begun_anew(finished):
    """Which would remove its model too."""
    run = RunDir(Path(finished.run_dir))
    (run.path / "model").mkdir()
    shutil.rmtree(run.commits.folder)
    with pytest.raises(UserError, match=r"run: is finished, and its checkpoints were removed: .* remove .*run/model"):
        claim(finished, "auto")
    (run.path / "model").rmdir()
    assert claim(finished, "auto")[1] == Start()


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_folder_that_cannot_be_made_is_told(tmp_path, resume):
    (tmp_path / "file").touch()
    for place, why in (
        (tmp_path / ("n" * 300), "File name too long"),
        (tmp_path / "file" / "below", "Not a directory"),
        (Path("/proc/run"), "No such file or directory"),
    ):
        with pytest.raises(UserError, match=rf"^run_dir: {place}: cannot be made or written to: {why}$"):
            claim(config_in(place), resume)


def test_resume_auto_in_an_unused_folder_begins_at_the_beginning(tmp_path):
    assert claim(config_in(tmp_path / "new"), "auto")[1] == Start()


def test_resume_auto_does_not_take_a_folder_that_is_no_runs(tmp_path):
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(UserError, match=r"holds files that are not a run's \(thesis.tex\): give another run_dir=…"):
        claim(config_in(tmp_path), "auto")
    for name in "abc":
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"holds files that are not a run's \(a, b, c, …\): give"):
        claim(config_in(tmp_path))
    with pytest.raises(UserError, match="a is a file, expected a folder"):
        claim(config_in(tmp_path / "a"))


def test_a_start_that_failed_before_any_step_does_not_use_its_folder(tmp_path):
    config = config_in(tmp_path / "run")
    run, _ = claim(config)
    run.new_attempt(config)
    run.say("ended: UserError: too few GPUs")
    (run.path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="is being written to by process"):
        claim(config)
    run.release()
    run, start = claim(config)
    assert start == Start()
    (run.path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    run.release()
    with pytest.raises(UserError, match="already in use: remove it, as it has no checkpoint, or give another"):
        claim(config)


def test_a_folder_with_a_recipe_of_the_users_own_is_not_taken(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {path: m}  # mine\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    for resume in (None, "auto"):
        with pytest.raises(UserError, match=r"not a run's \(config.yaml, metrics.jsonl, model\)"):
            claim(config_in(tmp_path), resume)
    assert "# mine" in (tmp_path / "config.yaml").read_text()


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    run, _ = claim(config_in(tmp_path / "run"))
    (run.path / "metrics.jsonl").write_text('{"kind": "eval", "step": 0}\n{"kind": "train", "step": 1}\n')
    run.release()
    run, start = claim(config_in(tmp_path / "run"), "auto")
    assert start == Start()
    run.rewind(start.step)
    assert (run.path / "metrics.jsonl").read_text() == ""


@pytest.mark.fault("damaged checkpoint is named", "--resume step=N", "refused with the reason")
def test_resume_auto_passes_over_a_damaged_checkpoint_and_a_named_one_fails(finished, capsys):
    run = RunDir.open(Path(finished.run_dir))
    (run.commits.path(20) / "rank-000.safetensors").unlink()
    with pytest.raises(UserError, match=r"no sound checkpoint: rank-000.safetensors is missing"):
        claim(finished, "step=20")
    assert claim(finished, "auto")[1].step == 10
    assert "checkpoint of step 20 is passed over" in capsys.readouterr().err
    assert "passed over" in (run.path / "run.log").read_text()


def test_resume_auto_does_not_begin_anew_over_checkpoints_that_are_all_damaged(finished):
    for step in (10, 20):
        (Path(finished.run_dir) / "checkpoints" / f"step-{step:06d}" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="none of its checkpoints is sound"):
        claim(finished, "auto")


def test_going_back_to_a_step_forgets_later_checkpoints(finished):
    run, start = claim(finished, "step=10")
    assert start.step == 10
    assert run.commits.steps() == [10, 20], "the start may fail yet"
    run.rewind(start.step)
    assert run.commits.steps() == [10]


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("step=15", r"no finished checkpoint of step 15; there are \[10, 20\]"),
        ("step=x", "--resume: got 'step=x', expected step=N with a number"),
        ("step=²", "--resume: got 'step=²', expected step=N with a number"),
    ],
)
def test_a_step_that_is_not_there(finished, resume, message):
    with pytest.raises(UserError, match=message):
        claim(finished, resume)


def test_a_fork_that_has_no_checkpoint_yet_begins_again_where_it_began(finished, tmp_path):
    """Not at the model that the other run began with."""
    fork, start = claim(config_in(tmp_path / "fork"), str(Path(finished.run_dir)))
    assert fork.newest() == start
    (fork.path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 21}) + "\n")
    fork.release()
    fork, again = claim(config_in(tmp_path / "fork"), "auto")
    assert again == start
    fork.rewind(start.step)
    assert (fork.path / "metrics.jsonl").read_text() == ""


def test_a_new_run_over_a_fork_that_failed_begins_at_the_beginning(finished, tmp_path):
    fork, _ = claim(config_in(tmp_path / "fork"), str(Path(finished.run_dir)))
    fork.release()
    fork, start = claim(config_in(tmp_path / "fork"))
    assert start == fork.newest() == Start()


def test_a_fork_begins_in_a_new_folder_at_another_runs_checkpoint(finished, tmp_path):
    fork, start = claim(config_in(tmp_path / "fork"), str(Path(finished.run_dir)))
    assert (fork.path, start.step) == (tmp_path / "fork", 20)
    one = Path(finished.run_dir) / "checkpoints" / "step-000010"
    assert claim(config_in(tmp_path / "fork-2"), str(one))[1] == Start(10, one)
    with pytest.raises(UserError, match="no sound checkpoint"):
        claim(config_in(tmp_path / "fork-3"), str(tmp_path))
    for nowhere in (tmp_path / "nowhere", one / "manifest.json"):
        with pytest.raises(UserError, match=r"--resume: .* no such folder; give auto, step=N, or a run or checkpoint"):
            claim(config_in(tmp_path / "fork-4"), str(nowhere))


def test_a_fork_of_a_relative_path_is_for_ranks_that_work_elsewhere(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, start = claim(config_in(tmp_path / "fork"), "run")
    assert start.checkpoint == RunDir(tmp_path / "run").commits.path(20)
    run.release()


@pytest.mark.fault("settings changed on resume", "edited fields", "refused by name")
def test_other_settings_are_refused_by_name_unless_allowed(finished):
    changed = config_in(Path(finished.run_dir), optim={"learning_rate": 2e-5}, cluster={"generators": 2})
    with pytest.raises(ConfigError) as e:
        claim(changed, "auto")
    assert str(e.value).splitlines()[1:] == ["optim.learning_rate: was 1e-05, is 2e-05"]
    assert claim(changed, "auto", allow_changes=True)[1].step == 20


@pytest.mark.fault("two runs, one directory", "two owners", "the second refused; the lock of a dead owner is free")
def test_a_folder_that_is_being_written_to_is_refused_and_free_again_afterwards(tmp_path):
    first, _ = claim(config_in(tmp_path / "run"))
    with pytest.raises(UserError, match="is being written to by process"):
        claim(config_in(tmp_path / "run"), "auto")
    first.release()
    claim(config_in(tmp_path / "run"), "auto")


def test_the_lock_of_another_machine_is_waited_for(tmp_path, monkeypatch, capsys):
    """NFS keeps it for a while when that machine is gone."""
    monkeypatch.setattr("sdft_dist.rundir.LEASE_S", 0.6)
    monkeypatch.setattr("sdft_dist.rundir.LOOK_S", 0.2)
    first, _ = claim(config_in(tmp_path / "run"))
    (first.path / "lock").write_text("process 7 on another-host")
    with pytest.raises(Fault, match="is being written to by process 7 on another-host"):
        claim(config_in(tmp_path / "run"), "auto")
    assert "waits 1 s for the end of its lock" in capsys.readouterr().err
    gone = threading.Timer(0.3, first.release)
    gone.start()
    claim(config_in(tmp_path / "run"), "auto")
    gone.join()


def test_every_attempt_has_a_folder_and_the_log_indents_last_words(tmp_path):
    config = config_in(tmp_path / "run")
    run, _ = claim(config)
    first, second = run.new_attempt(config), run.new_attempt(config)
    assert [first.name, second.name] == ["001", "002"]
    assert (second / "config.yaml").read_text() == (run.path / "config.yaml").read_text()
    shutil.rmtree(first)
    assert run.new_attempt(config).name == "003", "after the last one, whatever was removed"
    run.say("lost teachers 0: it died; its last words:\nFatal Python error: Aborted")
    said, words = (run.path / "run.log").read_text().splitlines()
    assert said.endswith("its last words:")
    assert words == "    Fatal Python error: Aborted"


def exported(run, *steps):
    """Leaves what a finished run does: evaluations of `steps`, and the model."""
    for step in steps:
        run.note_evaluation(step, {"new": [Judged("a", "a", True)]})
    (run.path / "samples").mkdir()
    for step in (1, *filter(None, steps)):
        run.samples(step).touch()
    for name in ("model", "adapter"):
        (run.path / name).mkdir()
        (run.path / name / "weights").touch()


def test_going_back_to_a_step_forgets_what_came_of_later_ones(finished):
    run = RunDir.open(Path(finished.run_dir))
    exported(run, 0, 10, 20)
    kept = run.path / "eval" / "step-000020-mine.jsonl"
    kept.touch()
    run, start = claim(finished, "step=10")
    run.rewind(start.step)
    assert [step for step in (0, 10, 20) if run.evaluation(step)] == [0, 10]
    assert not (run.path / "model").exists()
    assert not (run.path / "adapter").exists()
    assert [step for step, _ in run.files_of_steps("samples")] == [1, 10]
    assert kept.exists()


def test_going_on_from_the_end_keeps_what_came_of_it(finished):
    run = RunDir.open(Path(finished.run_dir))
    (run.path / "metrics.jsonl").write_text('{"kind": "train", "step": 20}\n')
    exported(run, 0, 20)
    run, start = claim(finished, "auto")
    run.rewind(start.step)
    assert [step for step in (0, 20) if run.evaluation(step)] == [0, 20]
    assert (run.path / "model" / "weights").exists()
    assert (run.path / "adapter" / "weights").exists()


def test_a_finished_run_that_is_trained_further_is_finished_no_more_and_keeps_its_model_aside(finished):
    run, _ = claim(finished, "auto")
    exported(run, 20)
    run.set_aside(20)
    assert not run.finished
    assert (run.path / "model.until-000020" / "weights").exists()
    assert (run.path / "adapter.until-000020" / "weights").exists()
    run.set_aside(20)  # nothing is there any more
    assert (run.path / "model.until-000020" / "weights").exists()


def test_beginning_anew_forgets_the_evaluation_of_the_start_too(tmp_path):
    run, _ = claim(config_in(tmp_path / "run"))
    exported(run, 0)
    run.rewind(0)
    assert run.evaluation(0) == {}
    assert not (run.path / "model").exists()


def test_a_damaged_line_of_metrics_is_named_and_the_folder_let_go(finished):
    path = Path(finished.run_dir) / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nhm\n')
    for _ in range(2):
        with pytest.raises(UserError, match=r"metrics.jsonl:2: is damaged: .*; remove this line"):
            claim(finished, "auto")


def test_held_out_rows_are_read_as_they_were_written(tmp_path):
    run, _ = claim(config_in(tmp_path / "run"))
    judged = {"new": [Judged("one\u2028two\u2029three\x85four\nfive", "ü\u2028", True, "q\x1e")]}
    run.note_evaluation(3, judged)
    assert run.evaluation(3) == judged
