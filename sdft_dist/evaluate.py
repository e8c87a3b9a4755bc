"""Accuracy on held-out rows: greedy completions of the plain prompt, scored by a Python function."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sdft_dist.config import EvalConfig
from sdft_dist.data import load_rows
from sdft_dist.errors import ConfigError, DataError
from sdft_dist.prompts import encode_prompts

Scorer = Callable[[str, str], bool]


class Completer(Protocol):
    """Whoever completes prompts greedily."""

    def complete(self, prompts: Sequence[np.ndarray], max_tokens: int) -> list[np.ndarray]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSet:
    """Held-out rows of one name."""

    name: str
    prompts: list[np.ndarray]  # int32 [P] each
    answers: list[str]


def exact_match(completion: str, answer: str) -> bool:
    """Whether completion and answer are the same but for white space around them."""
    return completion.strip() == answer.strip()


def load_scorer(spec: str) -> Scorer:
    """The function that `module:function` names. Raises ConfigError."""
    module, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise ConfigError(f"eval.scorer: {spec!r} is not a function as module:function: {e}") from e


def load_eval_sets(config: EvalConfig, tokenizer: Any) -> list[EvalSet]:
    """Read and encode all sets. Raises DataError with every bad row."""
    sets = []
    for name, source in config.sets.items():
        rows = load_rows(source, need_demonstration=False)
        lacking = [row.where for row in rows if row.answer is None]
        if lacking:
            raise DataError(f"{lacking[0]}: answer: is missing; eval.sets.{name} needs it in every row")
        answers = [row.answer or "" for row in rows]
        sets.append(EvalSet(name=name, prompts=encode_prompts(tokenizer, rows), answers=answers))
    return sets


def accuracy(
    sets: Sequence[EvalSet], completer: Completer, tokenizer: Any, scorer: Scorer, max_tokens: int
) -> dict[str, float]:
    """Share of right answers of each set, 0 to 1."""
    prompts = [p for s in sets for p in s.prompts]
    completions = iter(completer.complete(prompts, max_tokens))
    out = {}
    for s in sets:
        texts = [tokenizer.decode(next(completions), skip_special_tokens=True) for _ in s.prompts]
        right = [scorer(text, answer) for text, answer in zip(texts, s.answers, strict=True)]
        out[s.name] = sum(right) / len(right)
    return out
