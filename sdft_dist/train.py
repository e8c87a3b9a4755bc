"""One run from a configuration: checks everything, starts the fleet, trains, saves the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from sdft_dist.cluster import Fleet, launch, ray_session, resolve_device
from sdft_dist.config import Config
from sdft_dist.data import load_training_rows
from sdft_dist.errors import ConfigError
from sdft_dist.evaluate import accuracy, load_eval_sets, load_scorer
from sdft_dist.loop import train
from sdft_dist.prompts import encode_problems, load_tokenizer, stop_ids
from sdft_dist.rundir import RunDir
from sdft_dist.runlog import RunLog


def run(config: Config, *, title: str | None = None, console: Console | None = None) -> RunDir:
    """Train as `config` says and return the run directory, with the trained model in `model/`.

    Raises UserError before anything starts where configuration, data or model folder are wrong.
    """
    device = resolve_device(config)
    if device == "cpu" and config.model.dtype == "bfloat16":
        raise ConfigError("model.dtype: bfloat16 needs a GPU; with cluster.device=cpu use float32")
    tokenizer = load_tokenizer(config)
    encoded = encode_problems(config, tokenizer, load_training_rows(config.data, config.method))
    problems = encoded.problems
    eval_sets = load_eval_sets(config.eval, tokenizer)
    scorer = load_scorer(config.eval.scorer)
    rundir = RunDir.create(config)
    num_steps = config.num_steps(len(problems))
    ends = stop_ids(tokenizer, config.model.path, config.model.revision)

    def after_step(fleet: Fleet, log: RunLog) -> Callable[[int], None]:
        def act(step: int) -> None:
            every = config.eval.every
            if every and (step % every == 0 or step == num_steps):
                limit = config.rollout.max_completion_tokens
                log.write("eval", step, accuracy(eval_sets, fleet.generators, tokenizer, scorer, limit))
            every = config.checkpoint.every
            if step == num_steps or (every and step and step % every == 0):
                save_checkpoint(fleet, rundir.checkpoint(step), step)

        return act

    rundir.note_rows(encoded.dropped, encoded.truncated)
    runlog = RunLog(rundir.path, title=title or config.method, console=console, trace=config.trace)
    with runlog as log, ray_session(config):
        log.say("starting the engines (20–40 s)")
        with launch(config, problems, len(tokenizer), ends, on_span=log.span) as fleet:
            train(
                config,
                problems,
                fleet.rollouts,
                fleet.learner,
                fleet,
                log,
                after_step=after_step(fleet, log),
            )
    from sdft_dist.export import export

    export(rundir, rundir.path / "model")
    return rundir


def save_checkpoint(fleet: Fleet, folder: Path, step: int) -> None:
    """Write all shards, then the marker that makes them count."""
    fleet.learner.save(folder, step)
    (folder / "COMMITTED").write_text(f"{step}\n")
