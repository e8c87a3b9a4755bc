"""Ray Tune runs a sweep's trials: placement, concurrency, ASHA and Optuna are its own."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from sdft_dist.errors import Preempted, UserError, brief
from sdft_dist.files import write_whole
from sdft_dist.sweep.space import Range, Sweep, fits
from sdft_dist.sweep.trials import DONE, STOP, STOPPED, Trial, make_trial, run_trial, trial_bundles

os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths of recipes are the driver's
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # whose banner verbose=0 does not silence
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the run directories hold all of it

from ray import cloudpickle, tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

ASK_AGAIN = 100  # times, for values that were not tried


def tune_trials(
    sweep: Sweep,
    trials: list[Trial],
    device: str,
    number: int,
    console: Console,
    told: Callable[[], bool],
    grace_s: float,
) -> tuple[dict[str, Exception], bool]:
    """Run the trials that are not done, `number` at a time, until `told` says to stop: then they have `grace_s` to
    save. With asha also the done ones tell how they fared, which takes no GPU.

    Returns the trials that failed, and why, without those that were asked to stop; and whether there are no others to
    try than `trials` and what was begun now, as when optuna finds no more values.
    """
    begun = {trial.name: trial for trial in trials}
    todo = [trial for trial in trials if sweep.asha or trial.state not in DONE]
    asking = None
    if sweep.search == "optuna":
        assert sweep.trials is not None
        todo = [trial for trial in todo if fits(sweep.methods[trial.method].space, trial.values)]
        more = max(0, sweep.trials - len(trials)) + len(todo)
        asking = Asking(sweep, trials, todo, number)
        search: Any = {"search_alg": asking, "num_samples": more}
        space: dict[str, Any] = {}
    else:
        more, search = len(todo), {}
        space = {"trial": tune.grid_search([trial.name for trial in todo])}
    if not more:
        return {}, True

    def which(settings: dict[str, Any]) -> Trial:
        known = begun.get(settings.get("trial", ""))
        return known or make_trial(sweep, settings["method"], settings["values"])

    def trainable(settings: dict[str, Any]) -> None:
        run_trial(which(settings), device, tune.report, sweep.metric)

    def resources(settings: dict[str, Any]) -> tune.PlacementGroupFactory:
        trial = which(settings)
        asked = trial_bundles(trial.config, device)
        return tune.PlacementGroupFactory(asked[:1] if trial.state in DONE else asked)

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it prints a traceback for what Progress tells in a line
    progress = Progress(which, more, console, keep_checkpoints=sweep.keep_checkpoints)
    with tempfile.TemporaryDirectory(prefix="sdft-sweep-") as scratch:  # nothing in it is needed again
        results = tune.Tuner(
            tune.with_resources(trainable, resources),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="score",
                mode="max",
                scheduler=_scheduler(sweep),
                max_concurrent_trials=number,
                reuse_actors=False,
                **search,
            ),
            run_config=tune.RunConfig(
                storage_path=scratch,
                verbose=0,
                callbacks=[progress],
                stop=Ending(told, Path(sweep.out) / STOP, grace_s, progress),
            ),
        ).fit()
        failed: dict[str, Exception] = {}
        for result in results:
            cause = _cause(result.error)
            if cause is not None and not isinstance(cause, Preempted):  # which is left for the next time
                failed[which(result.config).name] = cause
    return failed, asking is None or asking.exhausted


def _cause(error: Exception | None) -> Exception | None:
    """What a trial has raised, which Ray has wrapped."""
    return getattr(error, "cause", None) or error


def _scheduler(sweep: Sweep) -> TrialScheduler:
    if sweep.asha is None:
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr="step", max_t=10**9, grace_period=sweep.asha.grace_steps, reduction_factor=sweep.asha.reduction
    )


class Progress(tune.Callback):
    """A line for each trial that begins and ends, and a mark in the folder of each that asha has stopped."""

    def __init__(self, which: Any, number: int, console: Console, *, keep_checkpoints: bool) -> None:
        self._which, self._number, self._console, self._ended = which, number, console, 0
        self._keep_checkpoints = keep_checkpoints
        self.running: set[str] = set()  # by Tune's names

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy, which nothing reads

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say which settings are tried."""
        self.running.add(trial.trial_id)
        own = self._which(trial.config)
        settings = ", ".join(f"{field}={value}" for field, value in own.values.items())
        self.say(f"{own.name} begins: {settings}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say how it ended."""
        own = self._which(trial.config)
        if own.state not in DONE:
            (own.folder / STOPPED).touch()
        if not self._keep_checkpoints:
            shutil.rmtree(own.run / "checkpoints", ignore_errors=True)
        self._end(trial)
        reached = (trial.last_result or {}).get("score")
        self.say(f"{own.name} is {own.state}" + (f" with {100 * reached:.1f}%" if reached is not None else ""))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that it was asked to stop, and what is saved, or that it failed; the sweep says why at its end."""
        self._end(trial)
        path = trial.pickled_error_file  # which Tune copies only later to where it reads it itself
        cause = _cause(cloudpickle.loads(Path(path).read_bytes())) if path else None
        self.say(f"{self._which(trial.config).name} {brief(cause) if isinstance(cause, Preempted) else 'failed'}")

    def _end(self, trial: Any) -> None:
        self.running.discard(trial.trial_id)
        self._ended += 1

    def say(self, text: str) -> None:
        """A line, with how many trials have ended."""
        self._console.print(f"[{self._ended}/{self._number}] {text}", highlight=False, markup=False, soft_wrap=True)


class Ending(tune.Stopper):
    """Ends Tune when the sweep was told to stop and all running trials have saved, or had `grace_s` for it. They see
    the file `stop`, wherever they run."""

    def __init__(self, told: Callable[[], bool], stop: Path, grace_s: float, progress: Progress) -> None:
        self._told, self._stop, self._grace_s, self._progress = told, stop, grace_s, progress
        self._until = math.inf

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy, which nothing reads

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial ends by itself."""
        return False

    def stop_all(self) -> bool:
        """Whether to end. Tune asks several times a second."""
        if not self._told():
            return False
        if self._until == math.inf:
            self._until = time.monotonic() + self._grace_s
            write_whole(self._stop, "")
            self._progress.say(f"stopping: trials save, up to {self._grace_s:g} s")
        return not self._progress.running or time.monotonic() > self._until


class Asking(Searcher):
    """Optuna's sampler, told of the trials that were done before; those of them that are `todo` come first."""

    def __init__(self, sweep: Sweep, begun: list[Trial], todo: list[Trial], number: int) -> None:
        try:
            import optuna
        except ImportError as e:
            raise UserError("search: optuna is missing; in the repository: pip install -e '.[sweep]'") from e
        super().__init__(metric="score", mode="max")
        self._sweep = sweep
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        ((self._method, space),) = ((name, method.space) for name, method in sweep.methods.items())
        self._distributions: dict[str, Any] = {
            field: optuna.distributions.FloatDistribution(how.low, how.high, log=how.log)
            if isinstance(how, Range)
            else optuna.distributions.CategoricalDistribution(how)
            for field, how in space.items()
        }
        sampler = optuna.samplers.TPESampler(seed=sweep.seed + len(begun), constant_liar=number > 1)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self.exhausted = False  # whether optuna finds no values any more that were not tried
        self._asked: dict[str, Any] = {}  # by Tune's names
        self._scores: dict[str, float | None] = {}  # by the values that were asked, None before they are known
        for trial in todo:
            self._study.enqueue_trial(trial.values)
        for trial in begun:
            found = self._found(trial)
            if trial not in todo and found is not None and fits(space, trial.values):
                self._scores[json.dumps(trial.values)] = found
                self._study.add_trial(
                    optuna.trial.create_trial(params=trial.values, distributions=self._distributions, value=found)
                )

    def _found(self, trial: Trial) -> float | None:
        """A trial's score: that of the weights that it exports, or the last so far; None before the first. One that has
        diverged has 0: nothing is worse."""
        from sdft_dist.selection import exported, score

        if trial.state == "diverged":
            return 0.0
        config = trial.config.changed(eval={"metric": self._sweep.metric}).eval
        record = exported(config, trial.records())
        return None if record is None else score(config, record)

    def suggest(self, trial_id: str) -> Any:
        """The next values that were not tried; Tune's FINISHED where Optuna finds none any more."""
        import optuna

        for _ in range(ASK_AGAIN):
            asked = self._study.ask(self._distributions)
            values = dict(asked.params)
            key = json.dumps(values)
            if key not in self._scores:
                self._asked[trial_id], self._scores[key] = asked, None
                return {"method": self._method, "values": values}
            known = self._scores[key]
            failed = optuna.trial.TrialState.FAIL if known is None else None
            self._study.tell(asked, known, state=failed)
        self.exhausted = True
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna what came of it."""
        import optuna

        asked = self._asked.pop(trial_id)
        found = self._found(make_trial(self._sweep, self._method, dict(asked.params)))
        if error or found is None:
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            self._scores[json.dumps(dict(asked.params))] = found
            self._study.tell(asked, found)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials' folders hold all that a sweep needs."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as `save`."""
