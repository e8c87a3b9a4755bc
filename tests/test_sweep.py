"""Which trials a sweep consists of, how many run at a time, and what its results say; test_sweep_lab.py runs one."""

import json
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers import write_jsonl
from rich.console import Console

from sdft_dist.errors import ConfigError, Diverged, Fault, Preempted, UserError
from sdft_dist.sweep.results import front, markdown, rows, write_report
from sdft_dist.sweep.space import load_sweep
from sdft_dist.sweep.trials import at_a_time, corners, make_trial, run_trial, sweep_all, trial_bundles, trials
from sdft_dist.sweep.tune import Asking, Ending, Progress

RATES = [1.0e-5, 1.0e-4]
TWO = {"sdft": {"space": {"teacher.ema_rate": [0.01, 0.1]}}}  # trials


@pytest.fixture
def sheet(tmp_path):
    """Writes a sweep whose fields are given, and returns it as loaded."""
    held_out = str(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "answer": "a"}]))
    recipe = {
        "model": {"path": "m"},
        "data": {"train": "d"},
        "steps": 20,
        "eval": {"every": 5, "sets": {"new": held_out, "old": held_out, "older": held_out}},
        "cluster": {"device": "cpu"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def write(**fields):
        plain = {"sdft": {"space": {"optim.learning_rate": RATES, "teacher.ema_rate": [0.01, 0.1]}}}
        tree = {"recipe": str(tmp_path / "recipe.yaml"), "out": str(tmp_path / "out"), "methods": plain} | fields
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        return load_sweep(tmp_path / "sweep.yaml")

    return write


def test_a_grid_is_every_combination_of_every_method(sheet):
    sft = {"set": {"method": "sft"}, "space": {"optim.learning_rate": RATES, "model.path": ["a", "b", "c"]}}
    sweep = sheet(methods={**TWO, "sft": sft, "plain": {}})
    found = trials(sweep)
    assert [t.method for t in found] == ["sdft"] * 2 + ["sft"] * 6 + ["plain"]
    assert {(t.config.optim.learning_rate, t.config.model.path) for t in found[2:8]} == {
        (rate, model) for rate in RATES for model in "abc"
    }
    assert found[2].config.method == "sft"
    assert len({t.folder for t in found}) == 9
    assert all(Path(t.config.run_dir).is_absolute() for t in found)


@pytest.mark.parametrize("below", ["", "/below"])
def test_a_file_is_no_folder_for_trials(sheet, tmp_path, below):
    with pytest.raises(ConfigError, match=f"sweep.yaml: out: {tmp_path}/rows.jsonl is a file, expected a folder$"):
        sheet(out=f"{tmp_path}/rows.jsonl{below}")


def test_a_recipe_in_a_sweeps_place_is_told_as_such(sheet, tmp_path):
    sheet()
    with pytest.raises(ConfigError, match=r"recipe.yaml: is a recipe, expected a sweep, which names it: recipe: \S+$"):
        load_sweep(tmp_path / "recipe.yaml")


def test_a_report_before_the_first_trial_is_no_warning(sheet, recwarn):
    write_report(sheet())
    assert not [str(warning.message) for warning in recwarn if warning.category is UserWarning]


def test_a_trial_keeps_its_folder_when_others_are_added(sheet):
    before = {t.name for t in trials(sheet())}
    more = {"sdft": {"space": {"teacher.ema_rate": [0.01, 0.1], "optim.learning_rate": [*RATES, 3e-5]}}}
    assert before < {t.name for t in trials(sheet(methods=more))}


def test_random_draws_are_the_same_every_time(sheet):
    space = {"optim.learning_rate": {"low": 1e-6, "high": 1e-3, "log": True}, "teacher.ema_rate": [0.01, 0.1]}
    sweep = sheet(search="random", trials=40, seed=3, methods={"sdft": {"space": space}})
    found = trials(sweep)
    assert [t.values for t in found] == [t.values for t in trials(sweep)]
    rates = sorted(t.values["optim.learning_rate"] for t in found)
    assert 1e-6 <= rates[0] < 1e-5 < rates[20] < 1e-4 < rates[-1] <= 1e-3, "even over the logarithm"
    assert {t.values["teacher.ema_rate"] for t in found} == {0.01, 0.1}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"search": "random"}, "trials: is for search=random"),
        ({"trials": 3}, "trials: is for search=random"),
        ({"search": "optuna", "trials": 3, "methods": {"a": {}, "b": {}}}, "optuna searches one method's space"),
        ({"methods": {"a": {"space": {"optim.learning_rate": {"low": 1, "high": 2}}}}}, "search=grid needs a list"),
        ({"methods": {"a": {"space": {"optim.learning_rate": []}}}}, "a list of values is empty"),
        ({"methods": {"a": {"space": {"seed": {"low": 2, "high": 1}}}}}, "low=2 must be below high=1"),
        ({"methods": {"a": {"space": {"seed": 3}}}}, "seed: expected a list of values, or low and high"),
        ({"serch": "grid"}, "serch: no such field; did you mean search"),
        ({"methods": {"a/b": {}}}, "methods.a/b: expected a name without /"),
        (
            {"methods": {"a": {"space": {"run_dir": [date(2026, 1, 2)]}}}},
            "methods.a.space: .* run_dir: .* date in quot",
        ),
        ({"methods": {"a": {"set": {"run_dir": date(2026, 1, 2)}}}}, "methods.a.set: .* run_dir: .* date in quotes"),
    ],
)
def test_mistakes_are_named_before_anything_starts(sheet, fields, words):
    with pytest.raises(ConfigError, match=words):
        sheet(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"methods": {"a": {"space": {"optim.learnin_rate": [1]}}}}, r"methods.a with .* did you mean optim.learning"),
        ({"methods": {"a": {"space": {"teacher.ema_rate": [2]}}}}, "teacher.ema_rate: got 2"),
        ({"new": "newer"}, "newer: is no held-out set"),
        ({"metric": "newer"}, "newer: is no held-out set"),
        ({"methods": {"a": {"set": {"eval.every": 0}}}}, "a sweep compares evaluations"),
    ],
)  # fmt: skip
def test_trials_that_are_no_recipe_are_named(sheet, fields, words):
    with pytest.raises(ConfigError, match=words):
        trials(sheet(**fields))


def node(gpus):
    return {"Alive": True, "Resources": {"CPU": 8, "GPU": gpus}}


def test_as_many_trials_as_the_budget_holds(sheet):
    configs = [t.config for t in trials(sheet())]
    assert at_a_time(sheet(concurrent=2), configs, "cpu", [node(0)]) == 2
    assert at_a_time(sheet(), configs, "cuda", [node(8)]) == 2, "three GPUs each"
    assert at_a_time(sheet(gpus=4), configs, "cuda", [node(8)]) == 1
    with pytest.raises(UserError, match="a trial needs 3 GPUs, the budget is 2"):
        at_a_time(sheet(gpus=2), configs, "cuda", [node(8)])
    waiting = [c.changed(cluster={"autoscaling": True}) for c in configs]
    assert at_a_time(sheet(gpus=6), waiting, "cuda", [node(0)]) == 2
    with pytest.raises(UserError, match="gpus: with cluster"):
        at_a_time(sheet(), waiting, "cuda", [node(0)])
    with pytest.raises(UserError, match=r"a trial needs 3 GPUs .* the cluster has 2 on 1 nodes"):
        at_a_time(sheet(), configs, "cuda", [node(2)])


def test_a_trial_s_group_holds_its_own_process_and_its_actors(sheet):
    (first, *_) = trials(sheet())
    assert trial_bundles(first.config, "cuda") == [{"CPU": 0.01}, *[{"GPU": 1, "CPU": 0.01}] * 3]


def pretend(trial, lines, *, finished):
    """A run directory as a run leaves it, with metrics.jsonl of `lines`."""
    (trial.run / "model").mkdir(parents=True) if finished else trial.run.mkdir(parents=True)
    (trial.run / "config.yaml").write_text(yaml.safe_dump(trial.config.model_dump(mode="json")))
    write_jsonl(trial.run / "metrics.jsonl", lines)


def begun(sweep, rate):
    """A trial of the averaging rate `rate` as optuna has begun it."""
    trial = make_trial(sweep, "sdft", {"teacher.ema_rate": rate})
    trial.folder.mkdir(parents=True, exist_ok=True)
    (trial.folder / "trial.json").write_text(json.dumps({"method": "sdft", "values": trial.values}))
    return trial


def evaluation(step, seconds, new, old, older, attempt=1):
    accuracies = {"new": new, "old": old, "older": older}
    return {"kind": "eval", "step": step, "attempt": attempt, "seconds": seconds, **accuracies}


def test_results_are_read_from_the_runs(sheet):
    sweep = sheet()
    done, stopped, interrupted, waiting = trials(sweep)
    pretend(done, [evaluation(5, 18.0, 0.2, 1, 1), evaluation(20, 36.0, 0.9, 0.8, 0.6, attempt=2)], finished=True)
    pretend(stopped, [evaluation(5, 18.0, 0.1, 0.9, 0.9)], finished=False)
    (stopped.folder / "stopped").touch()
    pretend(interrupted, [evaluation(10, 18.0, 0.1, 0.5, 0.5)], finished=False)
    found = rows(sweep)
    assert [row["state"] for row in found] == ["finished", "stopped", "interrupted", "waiting"]
    assert found[0] | {"hours": 0} == {
        "trial": done.name, "method": "sdft", "set/optim.learning_rate": 1e-5, "set/teacher.ema_rate": 0.01,
        "state": "finished", "step": 20, "new": 0.9, "retained": pytest.approx(0.7), "hours": 0,
    }  # fmt: skip
    assert found[0]["hours"] == pytest.approx(54 / 3600), "both attempts"
    assert [row["trial"] for row in front(found)] == [done.name, stopped.name]
    assert (found[3]["new"], found[3]["hours"]) == (None, 0.0)
    table = markdown(found).splitlines()
    assert table[2].startswith(f"| **{done.name}** | 1e-05 | 0.01 | finished | 20 | 90.0 | 70.0 | 0.015 |")
    out = write_report(sweep)
    assert json.loads((out / "results.json").read_text())[0]["new"] == 0.9
    assert (out / "pareto.png").stat().st_size > 5000
    assert waiting.state == "waiting"


def test_trials_of_another_recipe_are_refused(sheet):
    sweep = sheet()
    (first, *_) = trials(sweep)
    pretend(first, [], finished=True)
    recipe = Path(*sweep.recipe)
    recipe.write_text(recipe.read_text().replace("steps: 20", "steps: 30"))
    with pytest.raises(UserError, match="was run with another steps"):
        sweep_all(sweep, Console(quiet=True))


def test_optuna_is_not_asked_twice_for_the_same_and_its_corners_are_checked_first(sheet):
    pytest.importorskip("optuna")
    space = {"teacher.ema_rate": [0.01, 0.1], "optim.learning_rate": {"low": 1e-6, "high": 1e-4, "log": True}}
    sweep = sheet(search="optuna", trials=4, methods={"sdft": {"space": space}})
    assert len(corners(sweep)) == 4
    with pytest.raises(ConfigError, match="ema_rate: got 7"):
        corners(sheet(search="optuna", trials=4, methods={"sdft": {"space": {"teacher.ema_rate": [0.01, 7]}}}))
    few = sheet(search="optuna", trials=4, methods=TWO)
    done, other = (make_trial(few, "sdft", {"teacher.ema_rate": rate}) for rate in (0.01, 0.1))
    pretend(done, [evaluation(20, 9.0, 0.9, 0.8, 0.6)], finished=True)
    asking = Asking(few, [done, other], [other], 1)
    assert asking.suggest("a") == {"method": "sdft", "values": {"teacher.ema_rate": 0.1}}
    assert asking.suggest("b") == Asking.FINISHED, "one is done, the other under way"
    pretend(other, [evaluation(20, 9.0, 0.5, 0.8, 0.6)], finished=True)
    asking.on_trial_complete("a", {"score": 0.1})
    assert not Asking(few, [done, other], [other], 1).exhausted
    assert asking.suggest("c") == Asking.FINISHED
    assert asking.exhausted
    assert [round(trial.value, 6) for trial in asking._study.trials[:2]] == [round(1.9 / 3, 6), round(2.3 / 3, 6)]
    narrower = sheet(search="optuna", trials=4, methods={"sdft": {"space": {"teacher.ema_rate": [0.1, 0.2]}}})
    assert Asking(narrower, [done], [], 1).suggest("a")["values"]["teacher.ema_rate"] in (0.1, 0.2)


@pytest.mark.parametrize(
    ("text", "words"), [("", "does not tell a trial's method"), ('{"method": "dft", "values": {}}', "of method 'dft'")]
)
def test_a_folder_that_is_no_trial_of_this_sweep_is_named(sheet, text, words):
    sweep = sheet(search="optuna", trials=1, methods=TWO)
    (Path(sweep.out) / "one").mkdir(parents=True)
    (Path(sweep.out) / "one" / "trial.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        trials(sweep)


def test_asha_hears_of_the_last_step_when_the_model_is_saved(sheet, monkeypatch):
    """Who is told to stop then has done all its steps."""
    (trial, *_) = trials(sheet())
    heard = []

    def run(config, on_evaluation, **_):
        for step in (10, 20):
            on_evaluation({"step": step, "num_steps": 20, "new": 0.5, "old": 1.0, "older": 1.0})
        heard.append("saved")

    monkeypatch.setattr("sdft_dist.train.run", run)
    run_trial(trial, "cpu", lambda found: heard.append(found["step"]), "new")
    assert heard == [10, "saved", 20]


def test_asha_hears_of_a_last_step_that_was_done_before_when_the_model_is_saved(sheet, monkeypatch):
    """Of a trial that was killed while it saved its model; one that is done tells all at once."""
    (trial, other, *_) = trials(sheet())
    records = [evaluation(step, 9.0, 0.5, 1.0, 1.0) | {"num_steps": 20} for step in (10, 20)]
    pretend(trial, records, finished=False)
    pretend(other, records, finished=True)
    heard = []
    monkeypatch.setattr("sdft_dist.train.run", lambda config, **_: heard.append("saved"))
    for which in (trial, other):
        run_trial(which, "cpu", lambda found: heard.append(found["step"]), "new")
    assert heard == [10, "saved", 20, 10, 20]


def test_a_trial_of_a_sweep_that_stops_is_told_and_does_not_begin(sheet, monkeypatch):
    (trial, *_) = trials(sheet())
    told = []

    def run(config, stop, **_):
        told.append(stop())
        (trial.folder.parent / "stop").touch()
        told.append(stop())

    monkeypatch.setattr("sdft_dist.train.run", run)
    run_trial(trial, "cpu", lambda found: None, "new")
    assert told == [False, True]
    with pytest.raises(Preempted, match="before it began"):
        run_trial(trial, "cpu", lambda found: None, "new")


def test_tune_ends_when_told_and_no_trial_runs_or_their_time_is_up(tmp_path):
    told, heard, stop = [], [], tmp_path / "out" / "stop"
    progress = SimpleNamespace(running={"a"}, say=heard.append)
    patient, hasty = (Ending(lambda: bool(told), stop, grace_s, progress) for grace_s in (7.0, -1.0))
    assert not patient.stop_all()
    assert not stop.exists()
    told.append(True)
    assert [patient.stop_all(), patient.stop_all(), stop.exists()] == [False, False, True]
    assert heard == ["stopping: trials save, up to 7 s"]
    assert hasty.stop_all()
    progress.running.clear()
    assert patient.stop_all()


def test_trials_that_optuna_cannot_be_asked_for_again_are_named(sheet):
    fields = {"search": "optuna", "trials": 2}
    sweep = sheet(methods=TWO, **fields)
    done, other = begun(sweep, 0.01), begun(sweep, 0.1)
    for trial in (done, other):
        pretend(trial, [], finished=trial is done)
    wider = {"teacher.ema_rate": [0.01, 0.1], "optim.learning_rate": {"low": 1e-6, "high": 1e-4}}
    for space in (wider, {"teacher.ema_rate": {"low": 0.2, "high": 0.3}}):
        with pytest.raises(ConfigError, match=rf"methods.sdft.space: .* not done: {other.name}: remove their folders"):
            sweep_all(sheet(methods={"sdft": {"space": space}}, **fields), Console(quiet=True))


@pytest.fixture
def tuned(monkeypatch):
    """Puts a function in the place of Ray Tune, and nothing in that of Ray."""
    monkeypatch.setattr("sdft_dist.sweep.trials.ray_session", lambda config: nullcontext())
    monkeypatch.setattr("sdft_dist.sweep.trials.at_a_time", lambda *_: 1)
    monkeypatch.setattr("ray.nodes", list)
    return lambda tune_trials: monkeypatch.setattr("sdft_dist.sweep.tune.tune_trials", tune_trials)


@pytest.mark.parametrize(("no_others", "words"), [(True, "0 of 1 trials"), (False, "0 of 3 trials")])
def test_an_optuna_sweep_that_was_interrupted_between_trials_is_not_done(sheet, tuned, no_others, words):
    """Optuna's trials are on disk only when they have begun."""
    sweep = sheet(search="optuna", trials=3, methods=TWO)
    trial = make_trial(sweep, "sdft", {"teacher.ema_rate": 0.01})

    def tune_trials(*_):
        pretend(begun(sweep, 0.01), [], finished=False)
        return {}, no_others

    tuned(tune_trials)
    with pytest.raises(Preempted, match=words):
        sweep_all(sweep, Console(quiet=True))
    (trial.run / "model").mkdir()
    tuned(lambda *_: ({}, no_others))
    with nullcontext() if no_others else pytest.raises(Preempted, match="1 of 3 trials"):
        assert sweep_all(sweep, Console(quiet=True)) == [trial]


@pytest.mark.parametrize(
    ("failed", "kind"),
    [([ConfigError("a: b")], UserError), ([ConfigError("a: b"), Fault("a disk")], Fault), ([KeyError("a")], Fault)],
)
def test_a_sweep_of_which_trials_fail_ends_with_what_is_to_be_mended(sheet, tuned, failed, kind):
    tuned(lambda *_: ({str(number): error for number, error in enumerate(failed)}, True))
    with pytest.raises(kind, match=rf"{len(failed)} of 4 trials failed; .*\n  0: {type(failed[0]).__name__}: "):
        sweep_all(sheet(), Console(quiet=True))


def test_a_trial_that_diverges_is_done(sheet, monkeypatch):
    """Its settings would make it diverge whenever it is tried."""
    sweep = sheet()
    trial = trials(sweep)[0]

    def run(config, on_evaluation, **_):
        found = {"kind": "eval", "step": 0, "seconds": 1.0, "new": 0.2, "old": 0.9, "older": 0.9}
        pretend(trial, [found], finished=False)
        on_evaluation(found)
        raise Diverged("step 3: loss is nan")

    monkeypatch.setattr("sdft_dist.train.run", run)
    heard = []
    run_trial(trial, "cpu", heard.append, "new")
    assert trial.state == "diverged"
    assert (trial.folder / "diverged").read_text() == "step 3: loss is nan\n"
    Progress(lambda config: trial, 1, Console(quiet=True), keep_checkpoints=True).on_trial_complete(
        1, [], SimpleNamespace(config={}, trial_id="1", last_result={})
    )
    assert not (trial.folder / "stopped").exists()
    monkeypatch.setattr("sdft_dist.train.run", lambda *_, **__: pytest.fail("again"))
    run_trial(trial, "cpu", heard.append, "new")
    assert heard == [{"step": 0, "score": 0.2}] * 2
    (row, *_) = rows(sweep)
    assert (row["state"], row["new"], row["step"]) == ("diverged", None, 0), "what it was before counts for nothing"
    assert row not in front(rows(sweep))
    assert Asking._found(SimpleNamespace(_sweep=sweep), trial) == 0.0


def test_trials_of_optuna_are_those_that_were_begun(sheet):
    sweep = sheet(
        search="optuna", trials=3, methods={"sdft": {"space": {"teacher.ema_rate": {"low": 0.01, "high": 0.1}}}}
    )
    assert trials(sweep) == []
    trial = begun(sweep, 0.02)
    assert trials(sweep) == [trial]


def test_a_recipe_may_be_several_files_the_last_one_counts(sheet, tmp_path):
    (tmp_path / "mine.yaml").write_text("steps: 7\noptim: {warmup_steps: 3}\n")
    one = trials(sheet())[0].config
    two = trials(sheet(recipe=[str(tmp_path / "recipe.yaml"), str(tmp_path / "mine.yaml")]))[0].config
    assert (one.steps, two.steps, two.optim.warmup_steps) == (20, 7, 3)
    assert two.model == one.model
    with pytest.raises(ConfigError, match="recipe: "):
        sheet(recipe=[])
