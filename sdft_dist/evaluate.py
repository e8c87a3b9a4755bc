"""Accuracy on held-out rows: greedy completions of the plain prompt, scored by a Python function or a judge."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from sdft_dist.config import EvalConfig
from sdft_dist.data import load_rows
from sdft_dist.errors import ConfigError, DataError
from sdft_dist.judge import Case, Judge
from sdft_dist.prompts import encode_prompts

Scorer = Callable[[Sequence[Case]], list[bool]]
Z = 1.959964  # of the normal distribution, for 95%


class Completer(Protocol):
    """Whoever completes prompts greedily."""

    def complete(self, prompts: Sequence[np.ndarray], max_tokens: int) -> list[np.ndarray]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSet:
    """Held-out rows of one name."""

    name: str
    prompts: list[np.ndarray]  # int32 [P] each
    questions: list[str]  # the last message of each prompt, for scorers that want it
    answers: list[str]


class Judged(NamedTuple):
    """One held-out row."""

    completion: str
    answer: str
    right: bool


def exact_match(completion: str, answer: str) -> bool:
    """Whether completion and answer are the same but for white space around them."""
    return completion.strip() == answer.strip()


def load_scorer(config: EvalConfig) -> Scorer:
    """What `eval.scorer` names, for many cases at once. Raises ConfigError."""
    if config.scorer == "judge":
        return Judge(config.judge)
    module, _, name = config.scorer.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        wants_prompt = len(inspect.signature(function).parameters) == 3
    except (ImportError, AttributeError, TypeError, ValueError) as e:
        raise ConfigError(f"eval.scorer: {config.scorer!r} is not a function as module:function: {e}") from e

    def score(cases: Sequence[Case]) -> list[bool]:
        return [bool(function(c.completion, c.answer, *([c.prompt] if wants_prompt else []))) for c in cases]

    return score


def load_eval_sets(config: EvalConfig, tokenizer: Any) -> list[EvalSet]:
    """Read and encode all sets. Raises DataError with every bad row."""
    sets = []
    for name, source in config.sets.items():
        rows = load_rows(source, need_demonstration=False)
        lacking = [row.where for row in rows if row.answer is None]
        if lacking:
            raise DataError(f"{lacking[0]}: answer: is missing; eval.sets.{name} needs it in every row")
        answers = [row.answer or "" for row in rows]
        questions = [row.messages[-1]["content"] for row in rows]
        sets.append(EvalSet(name=name, prompts=encode_prompts(tokenizer, rows), questions=questions, answers=answers))
    return sets


def evaluate(
    sets: Sequence[EvalSet], completer: Completer, tokenizer: Any, scorer: Scorer, max_tokens: int
) -> dict[str, list[Judged]]:
    """Every row of each set with its greedy completion and whether that is right."""
    prompts = [p for s in sets for p in s.prompts]
    completions = iter(completer.complete(prompts, max_tokens))
    out = {}
    for s in sets:
        texts = [tokenizer.decode(next(completions), skip_special_tokens=True) for _ in s.prompts]
        right = scorer([Case(*row) for row in zip(s.questions, texts, s.answers, strict=True)])
        out[s.name] = [Judged(*row) for row in zip(texts, s.answers, right, strict=True)]
    return out


def accuracy(judged: Sequence[Judged]) -> float:
    """Share of right answers, 0 to 1."""
    return sum(row.right for row in judged) / len(judged)


def interval(judged: Sequence[Judged]) -> tuple[float, float]:
    """The 95% interval of the accuracy by Wilson's score (J. Am. Stat. Assoc. 22, 1927), which also holds at
    0 and 1, where the normal approximation has no width."""
    n, share = len(judged), accuracy(judged)
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)
