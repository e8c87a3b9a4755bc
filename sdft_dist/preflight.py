"""`sdft preflight`: what can be known before any training.

Lengths against the context; whether both views align; whether generator and learner agree on
log-probs for the same weights; and the in-context gain: how much better the model does when it is
shown the demonstration. SDFT can only teach what the teacher's view knows better than the student's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sdft_dist.cluster import launch
from sdft_dist.config import Config
from sdft_dist.data import Row
from sdft_dist.evaluate import EvalSet, Scorer, check_answers, evaluate, load_eval_sets, load_scorer
from sdft_dist.fleet import Fleet
from sdft_dist.inputs import read_inputs
from sdft_dist.prepare import check_device
from sdft_dist.problems import ProblemSet
from sdft_dist.recipe import parse
from sdft_dist.session import ray_session


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean with its 95% interval, by the normal approximation over rows."""

    mean: float
    low: float | None  # None where there is one row, which has no interval
    high: float | None
    rows: int

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:+.3f}, of one row"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One measure in both views, and the paired difference teacher − student."""

    student: Interval
    teacher: Interval
    gain: Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Preflight:
    """Everything that was found; the command prints it as a table or as JSON."""

    rows: int
    lengths: dict[str, dict[str, int]]  # tokens: median, p95 and max of each part
    max_length: int
    dropped: list[str]
    truncated: list[str]
    logprob_difference_mean: float  # nats a token, generator against learner
    logprob_difference_max: float
    likelihood: Comparison  # nats a demonstration token
    accuracy: Comparison | None  # greedy, where rows have an answer
    verdict: str


def interval(values: Sequence[float]) -> Interval:
    """Mean of one value a row, and its 95% interval."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean=mean, low=None, high=None, rows=1)
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean=mean, low=mean - half, high=mean + half, rows=len(values))


def compare(student: Sequence[float], teacher: Sequence[float]) -> Comparison:
    """Both views over the same rows."""
    gains = [t - s for s, t in zip(student, teacher, strict=True)]
    return Comparison(student=interval(student), teacher=interval(teacher), gain=interval(gains))


def verdict(likelihood: Comparison, accuracy: Comparison | None) -> str:
    """Whether SDFT is likely to help. Accuracy decides where it is known: likelihood also rises when a
    model copies the demonstration without understanding it."""
    decisive, name = (accuracy, "accuracy") if accuracy else (likelihood, "demonstration log-likelihood")
    gain = decisive.gain
    if gain.low is None or gain.high is None:
        return f"One row cannot tell whether SDFT helps ({name} gain {gain}): more rows are needed, some dozens."
    shown = f"{name} gain {gain} over {gain.rows} rows"
    if gain.low > 0:
        return f"SDFT is likely to help: the demonstration makes the model better ({shown})."
    if gain.high < 0:
        return f"SDFT is likely to hurt: the model does worse when shown the demonstration ({shown}). Try SFT."
    return f"No gain from the demonstration is seen ({shown}): SDFT is unlikely to help; try a larger model, or SFT."


def preflight(config: Config, num_rows: int = 64) -> Preflight:
    """Run all checks on the first `num_rows` rows. Raises UserError as a run would."""
    tree = config.model_dump()
    tree["rollout"] |= {"top_p": 1.0, "top_k": 0}  # or generator and learner would differ by what these cut off
    config = parse(Config, {**tree, "method": "sdft"})
    check_device(config)
    inputs = read_inputs(config)
    kept = inputs.kept[:num_rows]
    problems = ProblemSet(inputs.problems[i] for i in range(len(kept)))
    load_eval_sets(config, inputs.tokenizer)  # raises where a run would
    check_answers(config.eval, [row for row in kept if row.answer is not None])
    scorer = load_scorer(config.eval)
    start = launch(config, replace(inputs, problems=problems), engines=("generator",))
    with ray_session(config), start as fleet:
        fleet.to_generators(0)
        difference = logprob_differences(fleet, problems, config)
        likelihood = _likelihood(fleet, problems, config.model.max_length)
        accuracy = _accuracy(fleet, problems, kept, inputs.tokenizer, scorer, config.rollout.max_completion_tokens)
    return Preflight(
        rows=len(inputs.rows),
        lengths=_lengths(inputs.problems),
        max_length=config.model.max_length,
        dropped=inputs.dropped,
        truncated=inputs.truncated,
        logprob_difference_mean=float(difference.mean()),
        logprob_difference_max=float(difference.max()),
        likelihood=likelihood,
        accuracy=accuracy,
        verdict=verdict(likelihood, accuracy),
    )


def logprob_differences(fleet: Fleet, problems: ProblemSet, config: Config) -> np.ndarray:
    """|generator's − learner's log-prob|, float32 [T] in nats at the sampling temperature, of every token of one
    completion for each of `problems`, with which the fleet's own begin."""
    samples = fleet.generators.sample(range(len(problems)))
    prompts = [
        problems[s.key.problem].teacher_prompt_ids
        if config.rollout.from_teacher
        else problems[s.key.problem].prompt_ids
        for s in samples
    ]
    ours = fleet.learner.logprobs(prompts, [s.completion_ids for s in samples], config.rollout.temperature)
    return np.concatenate([np.abs(o - s.logprobs) for o, s in zip(ours, samples, strict=True)])


def _likelihood(fleet: Fleet, problems: ProblemSet, context: int) -> Comparison:
    """Mean log-prob of the demonstration's tokens in both views, of as many as the context holds in both."""
    targets = [p.demonstration_ids[: context - max(len(p.prompt_ids), len(p.teacher_prompt_ids))] for p in problems]
    views = [[p.prompt_ids for p in problems], [p.teacher_prompt_ids for p in problems]]
    student, teacher = ([float(x.mean()) for x in fleet.learner.logprobs(v, targets, 1.0)] for v in views)
    return compare(student, teacher)


def _accuracy(
    fleet: Fleet, problems: ProblemSet, rows: Sequence[Row], tokenizer: Any, scorer: Scorer, limit: int
) -> Comparison | None:
    """Greedy accuracy in both views, of the rows with an answer."""
    known = [(problem, row) for problem, row in zip(problems, rows, strict=True) if row.answer is not None]
    if not known:
        return None
    views = [
        EvalSet(
            name=view,
            prompts=[getattr(problem, view) for problem, _ in known],
            questions=[row.messages[-1]["content"] for _, row in known],
            answers=[row.answer or "" for _, row in known],
        )
        for view in ("prompt_ids", "teacher_prompt_ids")
    ]
    judged = evaluate(views, fleet, tokenizer, scorer, limit)
    return compare(*([float(row.right) for row in judged[view.name]] for view in views))


def _lengths(problems: ProblemSet) -> dict[str, dict[str, int]]:
    parts: dict[str, list[int]] = {"prompt": [], "teacher prompt": [], "demonstration": []}
    for p in problems:
        for name, ids in zip(parts, (p.prompt_ids, p.teacher_prompt_ids, p.demonstration_ids), strict=True):
            parts[name].append(len(ids))
    return {
        name: {"median": int(np.median(n)), "p95": int(np.percentile(n, 95)), "max": max(n)}
        for name, n in parts.items()
    }


def show(found: Preflight, console: Console) -> None:
    """A table of all findings, and the verdict."""
    table = Table(title=f"Preflight of {found.rows} rows", show_header=False)
    for name, n in found.lengths.items():
        table.add_row(f"{name}, tokens", f"median {n['median']}, 95% {n['p95']}, longest {n['max']}")
    table.add_row(
        "context",
        f"{found.max_length} tokens: {len(found.dropped)} rows dropped, "
        f"{len(found.truncated)} demonstrations shortened",
    )
    table.add_row("both views end alike", "yes")  # or it would have been refused
    table.add_row(
        "generator − learner, nats a token",
        f"mean {found.logprob_difference_mean:.2e}, max {found.logprob_difference_max:.2e}",
    )
    for name, c in (("log-likelihood a token", found.likelihood), ("accuracy", found.accuracy)):
        if c is not None:
            table.add_row(
                name,
                f"student {c.student.mean:.3f}, shown the demonstration {c.teacher.mean:.3f}, gain {c.gain}",
            )
    console.print(table)
    console.print(found.verdict, highlight=False)
