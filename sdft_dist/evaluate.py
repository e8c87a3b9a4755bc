"""Accuracy on held-out rows: greedy completions of the plain prompt, scored by a Python function or a judge."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from sdft_dist.config import Config, EvalConfig
from sdft_dist.data import Row, few, load_rows
from sdft_dist.errors import ConfigError, DataError, ScorerFailed, brief
from sdft_dist.judge import Case, Judge
from sdft_dist.prompts import encode_prompts

Scorer = Callable[[Sequence[Case]], list[bool]]
SCORERS = (
    "sdft_dist.evaluate:exact_match",
    *(f"sdft_dist.scorers:{name}" for name in ("letter", "text", "tool_calls")),
)
Z = 1.959964  # of the normal distribution, for 95%
# Fields of an evaluation's record that are not the accuracy on a set.
TAKEN = re.compile(r"kind|step|attempt|seconds|num_steps|judge_.*|.*_(interval|pass@.*|cut_share)")
THOUGHT = "</think>"  # what a model writes up to there is not its answer


class Completer(Protocol):
    """Whoever completes prompts: greedily, or with a seed for each as rollouts are sampled."""

    def complete(
        self, prompts: Sequence[np.ndarray], max_tokens: int, seeds: Sequence[int] | None = None
    ) -> list[np.ndarray]: ...


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
    prompt: str = ""  # its last message
    samples: int = 0  # drawn besides the greedy completion
    passed: int = 0  # how many of them are right
    cut: bool = False  # whether the completion has reached the limit of tokens


def exact_match(completion: str, answer: str) -> bool:
    """Whether completion and answer are the same but for white space around them."""
    return completion.strip() == answer.strip()


def load_scorer(config: EvalConfig) -> Scorer:
    """What `eval.scorer` names, for many cases at once; it raises ScorerFailed where the function fails on one. Raises
    ConfigError."""
    if config.scorer == "judge":
        return Judge(config.judge)
    function, wants_prompt, _ = _named(config.scorer)

    def is_right(case: Case) -> bool:
        try:
            return bool(function(case.completion, case.answer, *([case.prompt] if wants_prompt else [])))
        except Exception as error:  # also what would look like a disk's or a lost actor's, such as a TimeoutError
            about = f"on the completion {case.completion!r:.80} and the answer {case.answer!r:.80}"
            raise ScorerFailed(
                f"eval.scorer: {config.scorer}: {type(error).__name__}: {brief(error)}; {about}"
            ) from error

    return lambda cases: list(map(is_right, cases))


def _named(scorer: str) -> tuple[Callable[..., bool], bool, Callable[[str], Any]]:
    """The function, whether it takes the prompt too, and what looks at an answer: beside the scorer NAME there may be a
    function NAME_answer, which raises ValueError for one that it cannot compare with. Raises ConfigError."""
    module, _, name = scorer.partition(":")
    try:
        if not name:
            raise ValueError("it has no colon")
        found = importlib.import_module(module)
        function = getattr(found, name)
        signature = inspect.signature(function)
    except (ImportError, SyntaxError, AttributeError, TypeError, ValueError) as e:
        ours = [own for own in SCORERS if own.partition(":")[2] == scorer.rpartition(":")[2]]
        hint = f"; did you mean {ours[0]}?" if ours else ""
        raise ConfigError(f"eval.scorer: {scorer!r} is not a function as module:function: {e}{hint}") from e
    wants_prompt = _wants_prompt(signature)
    try:
        signature.bind("completion", "answer", *(["prompt"] if wants_prompt else []))
    except TypeError as e:
        raise ConfigError(
            f"eval.scorer: {scorer!r} cannot be called with (completion, answer) or (completion, answer, prompt): {e}; "
            "give other parameters a default"
        ) from e
    return function, wants_prompt, getattr(found, f"{name}_answer", lambda answer: None)


def _wants_prompt(signature: inspect.Signature) -> bool:
    """Whether a third positional parameter is the prompt: it is called so, or has no default of its own."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    third = [own for own in signature.parameters.values() if own.kind in positional][2:3]
    return any(own.name == "prompt" or own.default is own.empty for own in third)


def load_eval_sets(config: Config, tokenizer: Any) -> list[EvalSet]:
    """Read and encode all sets. Raises ConfigError for a name that a set cannot have, DataError with every bad row."""
    sets = []
    for name, source in config.eval.sets.items():
        if TAKEN.fullmatch(name):
            raise ConfigError(
                f"eval.sets.{name}: an evaluation's record has a field of that name: give the set another"
            )
        rows = load_rows(source, need_demonstration=False, setting=f"eval.sets.{name}")
        lacking = [row.where for row in rows if row.answer is None]
        if lacking:
            raise DataError(f"{lacking[0]}: answer: is missing; eval.sets.{name} needs it in every row")
        check_answers(config.eval, rows)
        prompts = encode_prompts(config, tokenizer, rows)
        answers = [row.answer or "" for row in rows]
        questions = [row.messages[-1]["content"] for row in rows]
        sets.append(EvalSet(name=name, prompts=prompts, questions=questions, answers=answers))
    return sets


def check_answers(config: EvalConfig, rows: Sequence[Row]) -> None:
    """Raises DataError with every row whose answer the scorer cannot compare with, ConfigError where there is no such
    scorer."""
    if config.scorer == "judge":
        return
    _, _, check = _named(config.scorer)
    problems = []
    for row in rows:
        try:
            check(row.answer or "")
        except ValueError as e:
            problems.append(f"{row.where}: answer: {e}")
    if problems:
        raise DataError("\n".join([f"{len(problems)} bad answers for eval.scorer={config.scorer}", *few(problems)]))


def evaluate(
    sets: Sequence[EvalSet], completer: Completer, tokenizer: Any, scorer: Scorer, max_tokens: int, samples: int = 0
) -> dict[str, list[Judged]]:
    """Every row of each set with its greedy completion and whether that is right, and how many of `samples`
    sampled ones are; the same ones whenever it is called. The scorer gets what follows the last `</think>`."""

    def texts(copies: int, seeds: Sequence[int] | None) -> Iterator[tuple[str, bool]]:
        """Of all sets in one call, which keeps the decode batch full; with whether it was cut."""
        prompts = [prompt for own in sets for prompt in own.prompts for _ in range(copies)]
        done = completer.complete(prompts, max_tokens, seeds)
        return ((tokenizer.decode(ids, skip_special_tokens=True), len(ids) >= max_tokens) for ids in done)

    def case(question: str, answer: str, completion: str) -> Case:
        return Case(question, completion.rpartition(THOUGHT)[2], answer)

    rows = sum(len(own.prompts) for own in sets)
    greedy, sampled = texts(1, None), texts(samples, range(samples * rows)) if samples else iter(())
    out = {}
    for own in sets:
        asked = list(zip(own.questions, own.answers, strict=True))
        said = [next(greedy) for _ in asked]
        right = scorer([case(*row, text) for row, (text, _) in zip(asked, said, strict=True)])
        lucky = scorer([case(*row, next(sampled)[0]) for row in asked for _ in range(samples)])
        out[own.name] = [
            Judged(text, answer, right[i], question, samples, sum(lucky[i * samples : (i + 1) * samples]), cut)
            for i, ((question, answer), (text, cut)) in enumerate(zip(asked, said, strict=True))
        ]
    return out


def pass_at(judged: Sequence[Judged]) -> dict[int, float]:
    """pass@k for k = 1, 2, 4, … and the number of samples: the chance that one of k drawn without
    replacement is right, without bias (arXiv 2107.03374, equation 1). Empty where none were drawn."""
    n = judged[0].samples
    ks = sorted({n, *(2**i for i in range(n.bit_length()) if 2**i <= n)} - {0})
    return {
        k: sum(1 - math.comb(row.samples - row.passed, k) / math.comb(row.samples, k) for row in judged) / len(judged)
        for k in ks
    }


def accuracy(judged: Sequence[Judged]) -> float:
    """Share of right answers, 0 to 1."""
    return sum(row.right for row in judged) / len(judged)


def summary(judged: Mapping[str, Sequence[Judged]]) -> dict[str, Any]:
    """For each held-out set NAME its accuracy as NAME, the ends of its 95% interval as NAME_interval, the share of
    greedy completions that were cut as NAME_cut_share, and as NAME_pass@k what `pass_at` finds."""
    intervals = {f"{name}_interval": interval(rows) for name, rows in judged.items()}
    passes = {f"{name}_pass@{k}": share for name, rows in judged.items() for k, share in pass_at(rows).items()}
    cut = {f"{name}_cut_share": sum(row.cut for row in rows) / len(rows) for name, rows in judged.items()}
    return {**{name: accuracy(rows) for name, rows in judged.items()}, **intervals, **cut, **passes}


def interval(judged: Sequence[Judged]) -> tuple[float, float]:
    """The 95% interval of the accuracy."""
    return wilson(sum(row.right for row in judged), len(judged))


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share by Wilson's score (J. Am. Stat. Assoc. 22, 1927), which also holds at
    0 and 1, where the normal approximation has no width."""
    share = right / n
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)
