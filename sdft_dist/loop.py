"""train(): self-distillation fine-tuning on one screen, and the Protocols that it drives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Sized
from typing import Any, Protocol

from sdft_dist.config import Config
from sdft_dist.errors import Diverged, UserError
from sdft_dist.problems import ProblemSet, batch
from sdft_dist.runlog import RunLog
from sdft_dist.types import SampleKey, TrainItem


class Rollouts(Protocol):
    """Generators, which hold the student and sample completions from the plain prompt, and teachers, which
    read each completion under the prompt with the demonstration."""

    def submit(self, keys: Sequence[SampleKey]) -> None: ...
    def take(self, keys: Sequence[SampleKey]) -> list[TrainItem]: ...


class Learner(Protocol):
    """Holds the student, its optimizer and its EMA."""

    def update(self, step: int, num_steps: int, items: Sequence[TrainItem]) -> dict[str, Any]: ...


class Push(Protocol):
    """Brings weights to the engines, stamped with the number of optimizer steps done."""

    def to_generators(self, version: int) -> None: ...
    def to_teachers(self, version: int) -> None: ...


def train(
    config: Config,
    problems: ProblemSet,
    rollouts: Rollouts,
    learner: Learner,
    push: Push,
    log: RunLog,
    *,
    after_step: Callable[[int], bool | None],
    start: int = 0,
) -> None:
    """Algorithm 1 of arXiv 2601.19897.

    Rollouts of `rollout.max_staleness` later steps are kept in flight; with 0 it is strictly on-policy.
    `after_step(n)` is called with the number of optimizer steps done, from `start` on, when all engines hold
    that version or will before they serve again: evaluation and checkpoints; True ends the training. With
    method "sft" the same learner imitates the demonstrations, and there is nothing to sample or to score. A run
    that goes on from a checkpoint begins at step `start`.
    """
    step, num_steps = start, config.num_steps(len(problems))
    push.to_teachers(step)
    push.to_generators(step)  # a broken push fails here, before any work is lost
    done = after_step(step)
    submitted = step  # rollouts of all earlier steps are done or under way
    skipped = 0  # steps in a row
    while step < num_steps and not done:
        with log.timer("step"):
            keys = batch_keys(config, problems, step)
            if config.method == "sdft":
                while submitted < min(num_steps, step + 1 + config.rollout.max_staleness):
                    rollouts.submit(batch_keys(config, problems, submitted))  # y ~ p_θ(· | x)
                    submitted += 1
                with log.timer("await_samples"):
                    taken = rollouts.take(keys)  # q_φ(· | x, c) at every position of y
                items = fresh(config, step, uncut(config, taken))
            else:
                taken = items = demonstrations(problems, keys)
            with log.timer("learn"):
                metrics = learner.update(step, num_steps, items)  # θ ← θ − ∇ D(q ‖ p_θ); φ ← EMA(θ)
            skipped = 0 if is_finite(metrics) else skipped + 1  # the learner has left the step out
            if skipped > config.optim.max_skipped:
                log.samples(step + 1, items, True)
                raise diverged(step, skipped, metrics, keys)
            step += 1
            with log.timer("push"):
                if step % config.teacher.sync_every == 0:
                    push.to_teachers(step)
                push.to_generators(step)
        lost = {"dropped": len(keys) - len(items), "cut_share": cut_share(taken), "skipped": int(skipped > 0)}
        log.step(step, num_steps, {**metrics, **lost}, items)
        done = after_step(step)


def batch_keys(config: Config, problems: Sized, step: int) -> list[SampleKey]:
    """What optimizer step `step` trains on: a pure function of the seed and the step."""
    rollout = config.rollout
    indices = batch(step, num_problems=len(problems), size=rollout.prompts_per_step, seed=config.seed)
    copies = rollout.completions_per_prompt if config.method == "sdft" else 1
    # A small data set may hold a problem twice in a batch: those are further completions of it.
    seen: dict[int, int] = {}
    keys = []
    for problem in indices:
        for _ in range(copies):
            keys.append(SampleKey(step, problem, seen.setdefault(problem, 0)))
            seen[problem] += 1
    return keys


def uncut(config: Config, items: list[TrainItem]) -> list[TrainItem]:
    """The samples to train on, by `rollout.cut_completions`. Raises UserError where it says so, or where
    none is left."""
    policy, limit = config.rollout.cut_completions, config.rollout.max_completion_tokens
    cut = [item for item in items if item.finish_reason == "length"]
    if not cut or policy == "keep":
        return items
    if policy == "error" or len(cut) == len(items):
        raise UserError(
            f"rollout.cut_completions={policy}: {len(cut)} of {len(items)} completions of step {cut[0].key.step} "
            f"were cut at rollout.max_completion_tokens={limit}, such as problem {cut[0].key.problem}: raise it"
        )
    return [item for item in items if item.finish_reason != "length"]


def cut_share(items: Sequence[TrainItem]) -> float:
    """Share of the completions that were cut, also of those that are dropped for it."""
    return sum(item.finish_reason == "length" for item in items) / max(1, len(items))


def fresh(config: Config, step: int, items: list[TrainItem]) -> list[TrainItem]:
    """The samples of which no token is older than `rollout.max_staleness` steps. Raises RuntimeError where
    none is left: then pushes do not reach the generators."""
    left = [item for item in items if step - item.policy_version <= config.rollout.max_staleness]
    if items and not left:
        oldest = min(item.policy_version for item in items)
        raise RuntimeError(
            f"step {step}: all {len(items)} samples are older than rollout.max_staleness="
            f"{config.rollout.max_staleness} allows; the oldest is of version {oldest}"
        )
    return left


def is_finite(metrics: dict[str, Any]) -> bool:
    """Whether loss and gradient are numbers."""
    return all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm"))


def diverged(step: int, skipped: int, metrics: dict[str, Any], keys: Sequence[SampleKey]) -> Diverged:
    """The error that names the step, what was not a number, and the rows."""
    rows = sorted({key.problem for key in keys})
    return Diverged(
        f"step {step}: loss is {metrics['loss']}, grad_norm is {metrics['grad_norm']}, the {skipped}. step in a row "
        f"(optim.max_skipped={skipped - 1}): lower optim.learning_rate, or look at the rows of this step, counted "
        f"from 0: {rows}"
    )


def demonstrations(problems: ProblemSet, keys: Sequence[SampleKey]) -> list[TrainItem]:
    """The demonstrations themselves as what to train on."""
    return [
        TrainItem(
            key=key,
            num_prompt_tokens=len(problems[key.problem].prompt_ids),
            num_completion_tokens=len(problems[key.problem].demonstration_ids),
            teacher_version=-1,
        )
        for key in keys
    ]
