"""What is evaluated and saved between two steps, also where something ends the run there; the fleet is made up."""

import json
import socket
from types import SimpleNamespace

import pytest
from helpers import config_of
from test_commits import FakeSaver
from test_rundir import claim

from sdft_dist import between_steps
from sdft_dist.between_steps import BetweenSteps
from sdft_dist.config import JudgeConfig
from sdft_dist.errors import Diverged, Fault, Preempted, ScorerFailed
from sdft_dist.evaluate import EvalSet
from sdft_dist.judge import Judge
from sdft_dist.runlog import RunLog, read_metrics

EVERY = {"every": 2, "sets": {"new": "f"}, "metric": "new", "patience": 2}


class Fleet:
    """Answers every prompt with one token; `learner` saves."""

    def __init__(self):
        self.learner, self.asked, self.limit = FakeSaver(), 0, 0

    def complete(self, prompts, max_tokens, seeds=None):
        self.asked, self.limit = self.asked + 1, max_tokens
        return [[1]] * len(prompts)


class Run:
    """A run of 8 steps in `folder`, from `start`."""

    def __init__(self, folder, start=0, rows=3, stop=lambda: False, resume=None, **sections):
        self.config = config_of(**({"run_dir": str(folder / "run"), "steps": 8, "eval": EVERY} | sections))
        self.rundir, self.start = claim(self.config, resume)
        self.fleet, self.scored = Fleet(), 0

        def scorer(cases):
            self.scored += len(cases)
            return [True] * len(cases)

        own = EvalSet(name="new", prompts=[[0]] * rows, questions=["q"] * rows, answers=["a"] * rows)
        prepared = SimpleNamespace(
            config=self.config,
            eval_sets=[own],
            scorer=scorer,
            num_steps=8,
            on_evaluation=lambda record: None,
            inputs=SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids, **_: "a")),
        )
        self.log = RunLog(self.rundir.path, title="")
        self.between = BetweenSteps(prepared, self.rundir, self.log, stop, start)
        self.rundir.rewind(start)
        self.between.begin()

    def after(self, *steps):
        return [self.between.after_step(self.fleet, step) for step in steps]

    def done(self):
        self.log._metrics.close()
        self.rundir.release()
        return [e["step"] for e in read_metrics(self.rundir.path, "eval")], self.rundir.commits.steps()


def fails(error):
    raise error


def test_an_evaluation_that_fails_leaves_the_steps_state_and_is_done_first_when_the_run_goes_on(tmp_path):
    run = Run(tmp_path)
    run.after(0, 1)
    run.between._prepared.scorer = lambda cases: fails(ScorerFailed("of the user's"))
    with pytest.raises(ScorerFailed) as failed:
        run.after(2)
    run.between.rescue(run.fleet, failed.value)
    assert run.done() == ([0], [2])
    run = Run(tmp_path, start=2, resume="auto")
    assert run.start.step == 2
    run.after(2, 3, 4)
    assert run.done() == ([0, 2, 4], [2])


def test_metrics_are_read_once_and_not_after_every_evaluation(tmp_path, monkeypatch):
    """They grow with every step: to read them each time would cost the square of the steps."""
    run = Run(tmp_path)
    run.after(0, 1, 2)
    run.done()
    run = Run(tmp_path, start=0, resume="auto")
    with monkeypatch.context() as patch:
        patch.setattr(between_steps, "read_metrics", lambda *_: pytest.fail("read again"))
        assert run.after(0, 2, 4) == [False, False, False]
        assert run.after(6) == [True], "two were no better than the first"
    assert run.done()[0] == [0, 2, 4, 6]


def test_a_checkpoint_that_is_due_does_not_wait_for_the_evaluation(tmp_path):
    run, found = Run(tmp_path, checkpoint={"every": 2}), []
    score = run.between._prepared.scorer
    run.between._prepared.scorer = lambda cases: (found.append(run.rundir.commits.steps()), score(cases))[1]
    run.after(0, 1, 2)
    assert found[-1] == [2]
    run.done()


def test_how_far_an_evaluation_is_is_said(tmp_path, monkeypatch):
    """One by a judge may take longer than all steps."""
    monkeypatch.setattr(between_steps, "LOOK_S", 0.0)
    run, said = Run(tmp_path), []
    monkeypatch.setattr(run.log, "say", lambda text, *, now=True: said.append((text, now)))
    run.after(0)
    assert said[:4] == [("evaluating", True), *((f"{done} of 3 judged", False) for done in range(3))]
    run.done()


def test_what_a_checkpoint_took_stands_with_its_own_step(tmp_path):
    run = Run(tmp_path, checkpoint={"every": 2})
    run.after(0, 1, 2, 3, 4)
    assert run.log._times == {}, "the next step's record would hold it, and that of the last checkpoint none"
    run.done()
    found = read_metrics(run.rundir.path, "checkpoint")
    assert [(record["step"], record["wait_s"] >= 0) for record in found] == [(2, True), (4, True)]


def test_held_out_completions_have_a_limit_of_their_own_or_that_of_rollouts(tmp_path):
    for own, limit in [({}, 7), ({"max_completion_tokens": 9}, 9)]:
        run = Run(tmp_path / str(limit), rollout={"max_completion_tokens": 7}, eval=EVERY | own)
        run.after(0)
        assert run.fleet.limit == limit
        run.done()


@pytest.mark.parametrize("error", [TimeoutError("silent"), Diverged("nan"), OSError("disk")])
def test_what_has_ended_the_learner_or_the_disk_saves_nothing_more(tmp_path, error):
    run = Run(tmp_path)
    run.after(0, 1)
    run.between.rescue(run.fleet, error)
    assert run.done()[1] == []


def test_nothing_is_saved_between_two_pushes_to_the_teachers(tmp_path):
    run = Run(tmp_path, teacher={"sync_every": 2})
    run.after(0, 1)
    run.between.rescue(run.fleet, Fault("a judge"))
    assert run.rundir.commits.steps() == []
    run.after(2)
    run.between.rescue(run.fleet, Fault("a judge"))
    assert run.done()[1] == [2]


def test_a_checkpoint_that_is_being_written_is_committed_before_the_end(tmp_path):
    run = Run(tmp_path, checkpoint={"every": 2})
    run.fleet.learner.done = False  # until somebody waits for it
    run.after(0, 1, 2)
    assert run.rundir.commits.steps() == []
    run.between.rescue(run.fleet, Fault("all samples were cut"))
    assert run.done()[1] == [2]


def test_a_second_failure_does_not_hide_the_first(tmp_path):
    run = Run(tmp_path)
    run.after(0, 1)
    run.fleet.learner = SimpleNamespace(state_bytes=lambda: fails(KeyError("too")))
    run.between.rescue(run.fleet, Fault("a judge"))
    assert "could not save step 1" in (run.rundir.path / "run.log").read_text()
    run.done()


def test_an_evaluation_ends_within_a_part_of_its_rows_where_the_run_is_asked_to_stop(tmp_path, monkeypatch):
    """However long a scorer takes for one of them."""
    monkeypatch.setattr(between_steps, "LOOK_S", 0.0)
    run = Run(tmp_path, rows=3, stop=lambda: run.scored > 0)
    with pytest.raises(Preempted):
        run.after(0)
    assert run.scored == 1
    assert run.done() == ([], [])


def test_an_evaluation_ends_where_the_judge_hangs_and_the_run_is_asked_to_stop(tmp_path, monkeypatch):
    """By a failure of the endpoint it would end only after all attempts, minutes later."""
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    monkeypatch.setattr(between_steps, "LOOK_S", 0.0)
    waiting = iter([False])
    run = Run(tmp_path, stop=lambda: next(waiting, True))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        settings = {"url": url, "model": "m", "key_variable": "JUDGE_KEY", "timeout_s": 4, "retries": 0}
        run.between._prepared.scorer = Judge(JudgeConfig(**settings))
        with pytest.raises(Preempted):
            run.after(0)
    assert run.done() == ([], [])


def test_a_run_that_had_stopped_early_stops_again_at_once(tmp_path):
    """Where the learner was lost while it ended."""
    run = Run(tmp_path)
    run.done()
    lines = [{"kind": "eval", "step": step, "new": new} for step, new in ((0, 0.0), (2, 1.0), (4, 0.0), (6, 0.0))]
    (run.rundir.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = Run(tmp_path, start=6, resume="auto")
    assert run.after(6) == [True]
    assert run.fleet.asked == 0
    assert run.done()[1] == [6]
