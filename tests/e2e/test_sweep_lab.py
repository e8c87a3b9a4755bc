"""Sweeps of real runs on Ray Tune: trials that are behind are stopped, what is done is not repeated."""

import os
import re
import subprocess
import sys
import uuid

import pytest
import ray
import yaml
from chaos import wait_for_step, wait_until
from processes import MARK, ended, nothing_left
from ray import tune
from rich.console import Console

from sdft_dist.errors import UserError
from sdft_dist.lab.base import shipped_base
from sdft_dist.lab.teaching import write_sweep
from sdft_dist.placement import placed
from sdft_dist.runlog import read_metrics
from sdft_dist.sweep.space import load_sweep
from sdft_dist.sweep.trials import sweep_all, trial_bundles, trials

pytestmark = pytest.mark.chaos


def sheet(folder, methods, **fields):
    """The lab's recipe under another sweep of few steps."""
    written = write_sweep(folder, shipped_base())
    tree = yaml.safe_load(written.read_text()) | {"methods": methods} | fields
    written.write_text(yaml.safe_dump(tree))
    return load_sweep(written)


def attempts(trial):
    return sorted(path.name for path in (trial.run / "attempts").iterdir())


def held():
    """Ids of the actors that live and of the placement groups that there are."""
    actors = ray._private.state.actors(actor_state_name="ALIVE")
    groups = ray.util.placement_group_table()
    return {*actors, *(name for name, group in groups.items() if group["state"] != "REMOVED")}


def test_a_trial_s_run_lives_in_the_group_that_tune_made_for_it(ray_cluster, tmp_path):
    (trial, *_) = trials(sheet(tmp_path, {"sdft": {}}))

    def look(settings):
        given = ray.util.get_current_placement_group()
        with placed(trial.config, "cpu", ("learner", "generator", "teacher")) as places:
            tune.report({"same": places.group.id == given.id, "places": [places.first, len(given.bundle_specs)]})

    asked = tune.PlacementGroupFactory(trial_bundles(trial.config, "cpu"))
    settings = tune.RunConfig(storage_path=str(tmp_path / "tune"), verbose=0)
    (found,) = tune.Tuner(tune.with_resources(look, asked), run_config=settings).fit()
    assert (found.metrics["same"], found.metrics["places"]) == (True, [1, 4])


def test_asha_stops_what_is_behind_and_nothing_is_done_twice(ray_cluster, tmp_path):
    """One keeps what the base knows, one destroys it at once."""
    short = {"method": "sft", "steps": 4, "eval.every": 2, "optim.warmup_steps": 0, "checkpoint.every": 2}
    methods = {"sft": {"set": short, "space": {"optim.learning_rate": [1.0e-8, 3.0e-2]}}}
    asha = {"grace_steps": 2, "reduction": 2}
    sweep = sheet(tmp_path, methods, metric="rev", asha=asha, keep_checkpoints=False)
    before = held()
    keeps, loses = sweep_all(sweep, Console())
    assert (keeps.state, loses.state) == ("finished", "stopped")
    assert {r["num_steps"] for r in keeps.records()} == {4}, "by which the last is known when it is told again"
    assert [r["step"] for r in loses.records()] == [0, 2]
    assert loses.records()[-1]["rev"] < 0.5
    wait_until(lambda: held() <= before, "the end of all that a stopped trial held")
    assert not any((trial.run / "checkpoints").exists() for trial in (keeps, loses))
    sweep_all(sweep, Console())
    assert attempts(keeps) == attempts(loses) == ["001"]


@pytest.mark.slow
def test_optuna_goes_on_from_the_trials_that_are_done(ray_cluster, tmp_path):
    pytest.importorskip("optuna")
    short = {"method": "sft", "steps": 1, "eval.every": 1, "checkpoint.every": 0}
    methods = {"sft": {"set": short, "space": {"optim.learning_rate": {"low": 1e-8, "high": 1e-6, "log": True}}}}
    (first,) = sweep_all(sheet(tmp_path, methods, search="optuna", trials=1), Console())
    again, second = sweep_all(sheet(tmp_path, methods, search="optuna", trials=2), Console())
    assert (again, again.state, second.state) == (first, "finished", "finished")
    assert second.values != first.values
    assert attempts(first) == ["001"]


def swept(folder):
    """`sdft sweep` on the sheet in `folder`, in a process of its own, and the mark that its processes carry."""
    command, mark = [sys.executable, "-m", "sdft_dist.cli", "sweep", str(folder / "sweep.yaml")], uuid.uuid4().hex
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {MARK: mark}
    )
    return process, mark


@pytest.mark.fault("preemption of a sweep", "SIGTERM", "its trial commits its step, exit 3, the next goes on from it")
def test_told_to_stop_a_sweep_s_trials_save_and_the_same_command_goes_on(tmp_path):
    fields = {"steps": 100, "eval.every": 100, "checkpoint.every": 0}
    (trial,) = trials(sheet(tmp_path, {"sdft": {"set": fields}}))
    process, mark = swept(tmp_path)
    wait_for_step(trial.run, 2, process)
    process.terminate()
    output = ended(process, 3)
    assert "stopping: trials save, up to" in output
    assert "0 of 1 trials are done; the same command goes on" in output
    log = (trial.run / "run.log").read_text()
    step = int(re.search(r"asked to stop: committed step (\d+)", log)[1])
    assert f"{trial.name} asked to stop: step {step} is saved; it goes on next time" in output
    assert nothing_left(mark)

    process, mark = swept(tmp_path)
    ended(process)
    assert trial.state == "finished"
    assert f"begins at step {step} of 100" in (trial.run / "run.log").read_text()
    assert [record["step"] for record in read_metrics(trial.run, "train")] == list(range(1, 101))
    assert nothing_left(mark)


def test_a_trial_that_fails_is_named(ray_cluster, tmp_path):
    methods = {"sft": {"set": {"method": "sft"}, "space": {"model.path": [str(tmp_path / "nowhere")]}}}
    sweep = sheet(tmp_path, methods)
    with pytest.raises(
        UserError, match=r"1 of 1 trials failed[^$]*UserError: model.path: [^$]*nowhere: no such folder"
    ):
        sweep_all(sweep, Console())
    assert [trial.state for trial in trials(sweep)] == ["waiting"]
