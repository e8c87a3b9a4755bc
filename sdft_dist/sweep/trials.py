"""`sdft sweep SWEEP.yaml`: whole runs over a space of settings, on Ray Tune.

A trial is an ordinary run in a folder of its own, named after its settings, and inside a placement group of its
own, so that a trial that is stopped frees everything. The folders are all that a sweep remembers: what is finished
is not repeated, what was interrupted goes on from its checkpoint, and the same command does both.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sdft_dist.config import MEAN, Config
from sdft_dist.errors import ConfigError, Diverged, Fault, Preempted, UserError, brief
from sdft_dist.files import write_whole
from sdft_dist.recipe import load_config
from sdft_dist.rundir import RunDir, refuse_other_settings
from sdft_dist.runlog import read_metrics
from sdft_dist.selection import score
from sdft_dist.session import ray_session, resolve_device
from sdft_dist.stop import LOOK_S, sigterm_told
from sdft_dist.sweep.space import Range, Sweep, fits, points
from sdft_dist.topology import CPU_SHARE, bundles, lacking, needs, num_gpus

MOST_CORNERS = 256  # of optuna's space that are checked before anything starts
TRIAL, STOPPED, DIVERGED = "trial.json", "stopped", "diverged"  # beside a trial's run directory
STOP = "stop"  # in the sweep's folder: trials save and end
SLACK_S = 75.0  # in which shared file systems show that file (NFS: 60 s), and Tune hears of a trial's end
DONE = ("finished", "stopped", "diverged")


@dataclass(frozen=True)
class Trial:
    """One run of a sweep; `values` are the fields that were varied."""

    method: str
    values: dict[str, Any]
    config: Config

    @property
    def folder(self) -> Path:
        """Where trial.json and the run directory are."""
        return Path(self.config.run_dir).parent

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.name

    @property
    def run(self) -> Path:
        """The run directory."""
        return Path(self.config.run_dir)

    @property
    def state(self) -> str:
        """finished, stopped (by asha), diverged, running, interrupted or waiting."""
        if RunDir(self.run).finished:
            return "finished"
        for mark in (STOPPED, DIVERGED):
            if (self.folder / mark).exists():
                return mark
        if not (self.run / "config.yaml").is_file():
            return "waiting"
        return "running" if RunDir.open(self.run).owner() else "interrupted"

    def records(self) -> list[dict[str, Any]]:
        """Its evaluations so far."""
        return read_metrics(self.run, "eval")


def make_trial(sweep: Sweep, method: str, values: dict[str, Any]) -> Trial:
    """The trial with these values. Raises ConfigError where they make no valid recipe."""
    fields = {**sweep.methods[method].set, **values}
    digest = hashlib.blake2b(json.dumps([method, sorted(fields.items())]).encode(), digest_size=4).hexdigest()
    folder = Path(sweep.out).absolute() / f"{method}-{digest}"
    try:
        config = load_config(sweep.recipe, [fields, {"run_dir": str(folder / "run")}])
    except ConfigError as e:
        raise ConfigError(f"methods.{method} with {json.dumps(values)}: {e}") from e
    if not config.eval.every:
        raise ConfigError("recipe: eval.every: a sweep compares evaluations: give eval.every and eval.sets")
    for name in (sweep.new, None if sweep.metric == MEAN else sweep.metric):
        if name is not None and name not in config.eval.sets:
            raise ConfigError(f"{name}: is no held-out set of the recipe: {', '.join(config.eval.sets)}")
    return Trial(method, values, config)


def trials(sweep: Sweep) -> list[Trial]:
    """All trials of a grid or a random search, which depend on the file alone; of optuna those that were begun."""
    if sweep.search == "optuna":
        known = sorted(Path(sweep.out).glob(f"*/{TRIAL}"), key=lambda path: path.stat().st_mtime)
        return [_known_trial(sweep, path) for path in known]
    found = {}
    for method in sweep.methods:
        for values in points(sweep, method):
            trial = make_trial(sweep, method, values)
            found[trial.name] = trial  # a draw may come twice
    return list(found.values())


def _known_trial(sweep: Sweep, path: Path) -> Trial:
    try:
        told = json.loads(path.read_text())
        method, values = told["method"], told["values"]
    except (ValueError, KeyError) as e:
        raise ConfigError(f"{path}: does not tell a trial's method and values: remove the folder, or mend it") from e
    if method not in sweep.methods:
        raise ConfigError(f"{path}: is of method {method!r}, which this sweep does not have: give it another `out`")
    return make_trial(sweep, method, values)


def corners(sweep: Sweep) -> list[Trial]:
    """Points that optuna may ask for: all values of lists, both ends of intervals."""
    ((method, own),) = sweep.methods.items()
    ends = [[how.low, how.high] if isinstance(how, Range) else how for how in own.space.values()]
    points = itertools.islice(itertools.product(*ends), MOST_CORNERS)
    return [make_trial(sweep, method, dict(zip(own.space, values, strict=True))) for values in points]


def at_a_time(sweep: Sweep, configs: list[Config], device: str, nodes: list[dict[str, Any]]) -> int:
    """How many trials run at a time within the budget of GPUs. Raises UserError where one trial does not fit."""
    worst = 0
    for config in configs:
        wanted = needs(config, device)
        missing = None if config.cluster.autoscaling else lacking(wanted, nodes)
        if missing:
            raise UserError(f"cluster: a trial {missing}")
        worst = max(worst, num_gpus(wanted))
    if not worst:
        return sweep.concurrent
    if sweep.gpus is None and any(config.cluster.autoscaling for config in configs):
        raise UserError("gpus: with cluster.autoscaling nobody knows how many there will be: give the most to use")
    have = sum(node["Resources"].get("GPU", 0) for node in nodes if node.get("Alive"))
    budget = int(sweep.gpus or have)
    if budget < worst:
        raise UserError(f"gpus: a trial needs {worst} GPUs, the budget is {budget}")
    return budget // worst


def sweep_all(sweep: Sweep, console: Console) -> list[Trial]:
    """Run what is missing; returns all trials. Raises UserError before anything starts where a trial is not valid or
    does not fit, Preempted where it was interrupted (by SIGTERM trials save first, by a second one and by Ctrl-C they
    go on from their newest checkpoints), and Fault that names the trials that failed, or UserError where all of them
    are the user's to mend."""
    with sigterm_told(again=lambda: os.kill(os.getpid(), signal.SIGINT)) as told:
        (Path(sweep.out) / STOP).unlink(missing_ok=True)
        first = trials(sweep)
        if sweep.search == "optuna":
            _refuse_misfits(sweep, first)
        for trial in first:
            refuse_other_settings(trial.config, ignore=("cluster",))
        probes = [*first, *(corners(sweep) if sweep.search == "optuna" else ())]
        with ray_session(probes[0].config):
            told()  # takes SIGTERM from Ray
            import ray

            from sdft_dist.sweep.tune import tune_trials

            device = resolve_device(probes[0].config)
            number = at_a_time(sweep, [trial.config for trial in probes], device, ray.nodes())
            grace_s = LOOK_S + max(trial.config.checkpoint.grace_s for trial in probes) + SLACK_S
            failed, no_others = tune_trials(sweep, first, device, number, console, told, grace_s)
    found = trials(sweep)
    done = sum(trial.state in DONE for trial in found)
    total = len(found) if no_others else max(len(found), sweep.trials or 0)
    if failed:
        kind = UserError if all(isinstance(why, UserError) for why in failed.values()) else Fault
        lines = "\n".join(f"  {name}: {type(why).__name__}: {brief(why)}" for name, why in failed.items())
        raise kind(f"{len(failed)} of {total} trials failed; the same command tries them again:\n{lines}")
    if done < total:
        raise Preempted(f"{done} of {total} trials are done; the same command goes on")
    return found


def _refuse_misfits(sweep: Sweep, begun: list[Trial]) -> None:
    """Optuna cannot be asked for the rest of a trial whose values are not of the space."""
    misfits = [t.name for t in begun if t.state not in DONE and not fits(sweep.methods[t.method].space, t.values)]
    if misfits:
        raise ConfigError(
            f"methods.{begun[0].method}.space: was another when these trials began, which are not done: "
            f"{', '.join(misfits)}: remove their folders in {sweep.out}, put the space back, or give another `out`"
        )


def run_trial(trial: Trial, device: str, report: Callable[[dict[str, Any]], None], metric: str) -> None:
    """Run or finish one trial, and report its evaluations, earlier ones too: what asha goes by. One that diverges is
    marked so, and done: it would diverge again. Raises Preempted where the sweep was told to stop."""
    from sdft_dist.train import run

    wanted = trial.config.changed(eval={"metric": metric}).eval
    last: list[dict[str, Any]] = []

    def tell(record: dict[str, Any]) -> None:
        report({"step": record["step"], "score": score(wanted, record)})

    def hear(record: dict[str, Any]) -> None:
        if record.get("num_steps") == record["step"]:
            last[:] = [record]  # asha must not stop a trial that has done all its steps and saves its model
        else:
            tell(record)

    done = trial.state in DONE
    for record in trial.records():
        (tell if done else hear)(record)
    if done:
        return
    stop = trial.folder.parent / STOP
    if stop.exists():
        raise Preempted("asked to stop before it began")
    write_whole(trial.folder / TRIAL, json.dumps({"method": trial.method, "values": trial.values}))
    # A process that Ray gave no GPU sees none, so it cannot tell whether there are any.
    config = trial.config.changed(cluster={"device": device})
    with open(os.devnull, "w") as nowhere:
        try:
            run(
                config,
                console=Console(file=nowhere),
                resume="auto",
                on_evaluation=hear,
                stop=stop.exists,
                advice="it goes on next time",
            )
        except Diverged as end:
            write_whole(trial.folder / DIVERGED, f"{end}\n")
    for record in last:
        tell(record)


def trial_bundles(config: Config, device: str) -> list[dict[str, float]]:
    """Of a trial's placement group: its own process, then its actors."""
    return [{"CPU": CPU_SHARE}, *bundles(needs(config, device))]
