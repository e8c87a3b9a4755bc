"""One run from a configuration: checks everything, starts the fleet, trains, saves the model; goes on
from the newest checkpoint when a part of it is lost."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from sdft_dist.between_steps import BetweenSteps, best_step
from sdft_dist.cluster import launch
from sdft_dist.commits import facts
from sdft_dist.config import Config
from sdft_dist.errors import ActorLost, Fault, Preempted, UserError, brief
from sdft_dist.fingerprint import fingerprint
from sdft_dist.gauges import Gauges
from sdft_dist.loop import train
from sdft_dist.model_card import model_card
from sdft_dist.prepare import Prepared, prepare
from sdft_dist.rundir import RunDir, Start
from sdft_dist.runlog import RunLog, read_metrics
from sdft_dist.selection import exhausted
from sdft_dist.session import ray_session
from sdft_dist.stop import asked_to_stop
from sdft_dist.tracker import Tracker, tracked
from sdft_dist.watch import length_signs


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
    config = config.changed(run_dir=str(Path(config.run_dir).absolute()))  # for ranks elsewhere
    try:
        with asked_to_stop(stop) as asked:
            prepared = prepare(config, on_evaluation, title, console)
            about = {"fingerprint": fingerprint(config, prepared.inputs.problems), "ranks": config.learner.ranks}
            rundir, start = RunDir.claim(config, resume, about, allow_changes=allow_changes)
            with _disk(rundir), _telling_its_end(rundir):
                rundir.note_rows(prepared.inputs.dropped, prepared.inputs.truncated)
                rundir.say(f"{config.method} begins at step {start.step} of {prepared.num_steps}")
                if start.step >= prepared.num_steps and not rundir.commits.steps():
                    raise UserError(
                        f"--resume: {start.checkpoint} is of step {start.step}: "
                        f"give more steps than {prepared.num_steps}"
                    )
                if _is_done(prepared, rundir, start.step):
                    rundir.rewind(start.step)
                else:
                    with tracked(config, rundir.path, rundir.say) as track, ray_session(config):
                        _survive(prepared, rundir, start, asked, track)
                rundir.say("training is done")
                if asked():
                    raise Preempted("asked to stop: all steps are saved, the model is not exported")
                _export(config, rundir, best_step(config, read_metrics(rundir.path, "eval"), rundir.commits.steps()))
            return rundir
    except Preempted as end:
        raise Preempted(f"{end}; {advice}" if advice else str(end)) from end


def _is_done(prepared: Prepared, rundir: RunDir, step: int) -> bool:
    """Whether there is nothing to train or to evaluate after `step`."""
    config = prepared.config.eval
    evals = [record for record in read_metrics(rundir.path, "eval") if record["step"] <= step]
    if step < prepared.num_steps:
        return exhausted(config, evals)
    return not config.every or any(record["step"] == step for record in evals)


@contextmanager
def _disk(rundir: RunDir) -> Iterator[None]:
    """Raises Fault where the disk of the run directory fails."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        raise Fault(f"{rundir.path}: {e.strerror}; earlier checkpoints are intact") from e


@contextmanager
def _telling_its_end(rundir: RunDir) -> Iterator[None]:
    """Writes into the log what ended the block, if anything did, and lets go of the directory."""
    try:
        yield
    except BaseException as error:  # Ctrl-C too is an end that the log tells of
        with suppress(OSError):  # of a full disk, which may be the end that is told of
            name, why = type(error).__name__, brief(error)
            rundir.say(f"ended: {name}" + (f": {why}" if why != name else ""))
        if isinstance(error, KeyboardInterrupt):
            steps = rundir.commits.steps()
            newest = f"step {steps[-1]} is saved: --resume auto goes on from there" if steps else "no step is saved"
            error.add_note(f"{rundir.path}: {newest}")
        raise
    finally:
        rundir.release()


def _survive(prepared: Prepared, rundir: RunDir, start: Start, asked: Callable[[], bool], track: Tracker) -> None:
    """Attempts until one comes to the end, each from the newest checkpoint. Raises Fault when
    `cluster.max_restarts` of them in a row made no new one."""
    restarts, wait_for_nodes = 0, False
    while True:
        if asked():
            raise Preempted(f"asked to stop before step {start.step + 1}")
        try:
            return _attempt(prepared, rundir, start, asked, track, wait_for_nodes)
        except ActorLost as error:
            rundir.say(f"lost the learner or its engines: {error}")
            now = rundir.newest()
            if asked():
                saved = f"step {now.step} is saved" if now.step else "no step is saved yet"
                raise Preempted(f"asked to stop, and lost: {error}\n{saved}") from error
            restarts = 0 if now.step > start.step else restarts + 1
            if restarts > prepared.config.cluster.max_restarts:
                raise Fault(f"{restarts} attempts in a row came to no new checkpoint: {error}") from error
            start, wait_for_nodes = now, True  # a lost one may come back
            rundir.commits.abandon()
            rundir.say(f"starting anew from step {start.step}")


def _attempt(
    prepared: Prepared, rundir: RunDir, start: Start, asked: Callable[[], bool], track: Tracker, wait_for_nodes: bool
) -> None:
    """From `start` to the end. Raises ActorLost where the run may go on from a checkpoint, and Preempted, with the
    state saved, where it was asked to stop."""
    config, problems = prepared.config, prepared.inputs.problems
    attempt = rundir.new_attempt(config.changed(steps=prepared.num_steps))
    gauges = Gauges("/".join(rundir.path.absolute().parts[-2:]))  # of sweeps all end in "run"
    runlog = RunLog(
        rundir.path,
        title=prepared.title,
        console=prepared.console,
        trace=attempt / "trace.json" if config.trace else None,
        first_step=start.step + 1,
        attempt=int(attempt.name),
        track=track,
        on_step=lambda record: gauges.set(record, fleet.rollouts.queues(), fleet.versions()),
        on_samples=lambda step, items, bad: between.note_samples(step, items, bad),
    )
    with runlog as log:
        between = BetweenSteps(prepared, rundir, log, asked, start.step)
        log.say("starting the engines (small ones in 20–40 s)")
        with launch(
            config,
            prepared.inputs,
            on_span=log.span,
            on_event=between.announce,
            start=start,
            stop=between.must_stop,
            wait_for_nodes=wait_for_nodes,
        ) as fleet:
            fleet.learner.must_see(rundir.path / "config.yaml")
            rundir.rewind(start.step)  # now that it can be done again
            rundir.set_aside(start.step)
            between.begin()
            log.warn(start.step, length_signs(prepared.num_steps, config.optim.warmup_steps))
            after_step = partial(between.after_step, fleet)
            try:
                train(config, problems, fleet.rollouts, fleet, fleet, log, after_step=after_step, start=start.step)
            except Preempted:
                between.save_now(fleet, "asked to stop")
                raise Preempted(f"asked to stop: step {between.step} is saved") from None
            except Exception as error:
                between.rescue(fleet, error)
                raise
            between.finish_saving(fleet, wait=True)


def _export(config: Config, rundir: RunDir, step: int | None) -> None:
    """The model of a checkpoint (None: the last), and its adapters where such were trained, in the place of what an
    earlier attempt may have left; nothing where the same is there, which somebody may be reading."""
    if _is_exported(config, rundir, step):
        return
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


def _is_exported(config: Config, rundir: RunDir, step: int | None) -> bool:
    """Whether what was exported says of itself what an export would say now; its README is written last."""
    card = rundir.path / "model" / "README.md"
    if not card.is_file() or (config.model.lora.rank and not (rundir.path / "adapter").is_dir()):
        return False
    return card.read_text() == model_card(rundir, config, facts(rundir.checkpoint(step)), "student")
