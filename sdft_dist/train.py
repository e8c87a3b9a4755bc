"""One run from a configuration: checks everything, starts the fleet, trains, saves the model; goes on
from the newest checkpoint when a part of it is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from sdft_dist.cluster import launch, ray_session, resolve_device
from sdft_dist.config import Config
from sdft_dist.data import ProblemSet, load_training_rows
from sdft_dist.errors import ActorLost, ConfigError, Fault, Preempted, UserError, brief
from sdft_dist.evaluate import EvalSet, accuracy, evaluate, interval, load_eval_sets, load_scorer, pass_at
from sdft_dist.fingerprint import fingerprint
from sdft_dist.fleet import Fleet
from sdft_dist.gauges import Gauges
from sdft_dist.judge import Judge
from sdft_dist.loop import train
from sdft_dist.prompts import encode_problems, load_tokenizer, stop_ids
from sdft_dist.rundir import RunDir, Start
from sdft_dist.runlog import RunLog, read_metrics
from sdft_dist.selection import best, exhausted
from sdft_dist.stop import asked_to_stop
from sdft_dist.topology import push_transport


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run needs and what was checked before anything started."""

    config: Config
    tokenizer: Any
    problems: ProblemSet
    eval_sets: list[EvalSet]
    scorer: Any
    stop_ids: list[int]
    num_steps: int
    on_evaluation: Callable[[dict[str, Any]], None]


def run(
    config: Config,
    *,
    title: str | None = None,
    console: Console | None = None,
    resume: str | None = None,
    allow_changes: bool = False,
    on_evaluation: Callable[[dict[str, Any]], None] = lambda record: None,
    stop: Callable[[], bool] = lambda: False,
    advice: str = "go on with --resume auto",
) -> RunDir:
    """Train as `config` says and return the run directory, with the trained model in `model/`.

    `resume` is as in `RunDir.claim`; `on_evaluation` hears each evaluation: its step, the run's num_steps, and
    accuracies; `stop` tells of another reason to stop than SIGTERM and drained nodes, and `advice` how to go on then.
    Raises UserError before anything starts where configuration, data or model folder are wrong; Preempted when it is
    asked to stop, with the state saved; Fault where parts are lost more often than `cluster.max_restarts` allows.
    """
    try:
        with asked_to_stop(stop) as asked:
            prepared, encoded = _prepare(config, on_evaluation)
            facts = {"fingerprint": fingerprint(config, prepared.problems), "ranks": config.learner.ranks}
            rundir, start = RunDir.claim(config, resume, facts, allow_changes=allow_changes)
            with _telling_its_end(rundir):
                rundir.note_rows(encoded.dropped, encoded.truncated)
                rundir.say(f"{config.method} begins at step {start.step} of {prepared.num_steps}")
                if start.step >= prepared.num_steps and not rundir.commits.steps():
                    raise UserError(
                        f"--resume: {start.checkpoint} is of step {start.step}: "
                        f"give more steps than {prepared.num_steps}"
                    )
                if start.step < prepared.num_steps and not exhausted(config.eval, _evaluations(rundir)):
                    with ray_session(config):
                        _survive(prepared, rundir, start, title or config.method, console, asked)
                rundir.say("training is done")
                if asked():
                    raise Preempted("asked to stop: all steps are saved, the model is not exported")
                _export(config, rundir, _kept(config, rundir, rundir.commits.steps()))
            return rundir
    except Preempted as end:
        raise Preempted(f"{end}; {advice}" if advice else str(end)) from end


@contextmanager
def _telling_its_end(rundir: RunDir) -> Iterator[None]:
    """Writes into the log what ended the block, if anything did, and lets go of the directory."""
    try:
        yield
    except BaseException as error:  # Ctrl-C too is an end that the log tells of
        with suppress(OSError):  # of a full disk, which may be the end that is told of
            rundir.say(f"ended: {type(error).__name__}: {brief(error)}")
        raise
    finally:
        rundir.release()


def _prepare(config: Config, on_evaluation: Callable[[dict[str, Any]], None]) -> tuple[Prepared, Any]:
    device = resolve_device(config)
    if device == "cpu" and config.model.dtype == "bfloat16":
        raise ConfigError("model.dtype: bfloat16 needs a GPU; with cluster.device=cpu use float32")
    if device == "cpu" and config.model.attention in ("varlen", "flash_attention_2"):
        raise ConfigError(f"model.attention: {config.model.attention} needs a GPU; with cluster.device=cpu use sdpa")
    if device == "cpu" and config.cluster.sleep:
        raise ConfigError("cluster.sleep: there is no GPU's memory to give up; set it to false")
    push_transport(config, device)  # raises where there is no such way
    tokenizer = load_tokenizer(config)
    encoded = encode_problems(config, tokenizer, load_training_rows(config.data, config.method))
    prepared = Prepared(
        config=config,
        tokenizer=tokenizer,
        problems=encoded.problems,
        eval_sets=load_eval_sets(config, tokenizer),
        scorer=load_scorer(config.eval),
        stop_ids=stop_ids(tokenizer, config.model.path, config.model.revision),
        num_steps=config.num_steps(len(encoded.problems)),
        on_evaluation=on_evaluation,
    )
    return prepared, encoded


def _survive(
    prepared: Prepared, rundir: RunDir, start: Start, title: str, console: Console | None, asked: Callable[[], bool]
) -> None:
    """Attempts until one comes to the end, each from the newest checkpoint. Raises Fault when
    `cluster.max_restarts` of them in a row made no new one."""
    restarts, wait_for_nodes = 0, False
    while True:
        if asked():
            raise Preempted(f"asked to stop before step {start.step + 1}")
        try:
            return _attempt(prepared, rundir, start, title, console, asked, wait_for_nodes)
        except ActorLost as error:
            rundir.say(f"lost the learner or its engines: {error}")
            now = rundir.newest() if rundir.commits.steps() else start  # of a fork
            if asked():
                raise Preempted(f"asked to stop, and lost: {error}\nstep {now.step} is saved") from error
            restarts = 0 if now.step > start.step else restarts + 1
            if restarts > prepared.config.cluster.max_restarts:
                raise Fault(f"{restarts} attempts in a row came to no new checkpoint: {error}") from error
            start, wait_for_nodes = now, True  # a lost one may come back
            rundir.commits.abandon()
            rundir.rewind(start.step)
            rundir.say(f"starting anew from step {start.step}")


def _attempt(
    prepared: Prepared,
    rundir: RunDir,
    start: Start,
    title: str,
    console: Console | None,
    asked: Callable[[], bool],
    wait_for_nodes: bool,
) -> None:
    config, at = prepared.config, start.step
    saved = set(rundir.commits.steps())
    rundir.commits.kept = _kept(config, rundir, saved)
    attempt = rundir.new_attempt(config.model_copy(update={"steps": prepared.num_steps}))
    trace = attempt / "trace.json" if config.trace else None
    gauges = Gauges("/".join(rundir.path.absolute().parts[-2:]))  # of sweeps all end in "run"
    runlog = RunLog(
        rundir.path,
        title=title,
        console=console,
        trace=trace,
        first_step=start.step + 1,
        attempt=int(attempt.name),
        on_step=lambda record: gauges.set(record, fleet.rollouts.queues(), fleet.versions()),
    )

    def event(text: str) -> None:
        rundir.say(text)
        log.say(text.splitlines()[0])

    def told() -> bool:
        """Whether to stop here: after a step between two pushes to the teachers, a resumed run had another one."""
        return asked() and at % config.teacher.sync_every == 0

    def after_step(step: int) -> bool:
        nonlocal at
        at = step
        every, last = config.eval.every, step == prepared.num_steps
        if every and (step % every == 0 or last):
            _evaluate(prepared, rundir, fleet, log, step)
            rundir.commits.kept = _kept(config, rundir, saved | {step})
            if not last and exhausted(config.eval, _evaluations(rundir)):
                event(f"stops early: eval.{config.eval.metric} was no better for {config.eval.patience} evaluations")
                last = True
        every = config.checkpoint.every
        if last or step == rundir.commits.kept or (every and step and step % every == 0):
            with log.timer("checkpoint"):
                rundir.commits.start(fleet.learner, step)
            saved.add(step)
        finish(wait=last)
        if told() and not last:
            raise Preempted
        return last

    def finish(*, wait: bool) -> None:
        folder = rundir.commits.finish(fleet.learner, wait=wait)
        if folder is not None:
            rundir.say(f"committed {folder.name}")

    with runlog as log:
        log.say("starting the engines (20–40 s)")
        with launch(
            config,
            prepared.problems,
            len(prepared.tokenizer),
            prepared.stop_ids,
            on_span=log.span,
            on_event=event,
            start=start,
            stop=told,
            wait_for_nodes=wait_for_nodes,
        ) as fleet:
            try:
                train(
                    config,
                    prepared.problems,
                    fleet.rollouts,
                    fleet,
                    fleet,
                    log,
                    after_step=after_step,
                    start=start.step,
                )
            except Preempted:
                _save_now(rundir, fleet, at)
                raise Preempted(f"asked to stop: step {at} is saved") from None
            finish(wait=True)


def _evaluate(prepared: Prepared, rundir: RunDir, fleet: Fleet, log: RunLog, step: int) -> None:
    """Judge every held-out row under the weights after `step` optimizer steps, and write down all that came of it."""
    config, scorer = prepared.config, prepared.scorer
    limit, samples = config.rollout.max_completion_tokens, config.eval.samples
    judged = evaluate(prepared.eval_sets, fleet, prepared.tokenizer, scorer, limit, samples)
    rundir.note_evaluation(step, judged)
    found = {name: accuracy(rows) for name, rows in judged.items()}
    intervals = {f"{name}_interval": interval(rows) for name, rows in judged.items()}
    passes = {f"{name}_pass@{k}": share for name, rows in judged.items() for k, share in pass_at(rows).items()}
    cost = scorer.cost() if isinstance(scorer, Judge) else {}
    place = {"num_steps": prepared.num_steps}  # who reads the record later knows then whether it was the last
    log.write("eval", step, {**place, **found, **intervals, **passes, **cost})
    prepared.on_evaluation({**place, **found, "step": step})


def _save_now(rundir: RunDir, fleet: Fleet, step: int) -> None:
    """Commit the state after `step` optimizer steps, between two of them."""
    rundir.commits.finish(fleet.learner, wait=True)
    if step not in rundir.commits.steps():
        rundir.commits.start(fleet.learner, step)
        rundir.commits.finish(fleet.learner, wait=True)
    rundir.say(f"asked to stop: committed step {step}")


def _evaluations(rundir: RunDir) -> list[dict[str, Any]]:
    path = rundir.path / "metrics.jsonl"
    return read_metrics(rundir.path, "eval") if path.exists() else []


def _kept(config: Config, rundir: RunDir, saved: Collection[int]) -> int | None:
    """The step of the best evaluation so far, of those whose weights are `saved`, where `eval.keep_best` asks for it:
    a resumed run may ask for it later than the first."""
    records = [record for record in _evaluations(rundir) if record["step"] in saved]
    found = best(config.eval, records) if config.eval.keep_best else None
    return None if found is None else int(found["step"])


def _export(config: Config, rundir: RunDir, step: int | None) -> None:
    """The model of a checkpoint (None: the last), and its adapters where such were trained, in the place of what an
    earlier attempt may have left."""
    from safetensors import SafetensorError

    from sdft_dist.export import export, export_adapter

    # The model last: that it is there says that the run is finished.
    written = {**({"adapter": export_adapter} if config.model.lora.rank else {}), "model": export}
    for name, write in written.items():
        beside = rundir.path / f"{name}.new"
        shutil.rmtree(beside, ignore_errors=True)
        try:
            write(rundir, beside, step=step)
            shutil.rmtree(rundir.path / name, ignore_errors=True)
            beside.rename(rundir.path / name)
        except (OSError, SafetensorError) as e:
            shutil.rmtree(beside, ignore_errors=True)
            raise Fault(f"{rundir.path / name}: {e}; the checkpoints are intact") from e
