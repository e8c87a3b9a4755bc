"""Accuracy and pass@k; the model is made up."""

import itertools

import numpy as np
import pytest

from sdft_dist.config import EvalConfig
from sdft_dist.evaluate import EvalSet, Judged, evaluate, load_scorer, pass_at


class Tokenizer:
    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


class Completer:
    """Echoes the prompt; when it samples, every third time."""

    def complete(self, prompts, max_tokens, seeds=None):
        if seeds is None:
            return list(prompts)
        return [p if seed % 3 == 0 else p[:0] for p, seed in zip(prompts, seeds, strict=True)]


def a_set(name, *answers):
    prompts = [np.array([i]) for i in range(len(answers))]
    return EvalSet(name=name, prompts=prompts, questions=[f"q{i}" for i in range(len(answers))], answers=list(answers))


def test_greedy_and_sampled_completions_are_judged_row_by_row():
    scorer = load_scorer(EvalConfig())
    found = evaluate([a_set("one", "0", "no", "2"), a_set("two", "0")], Completer(), Tokenizer(), scorer, 9, samples=4)
    assert found["one"] == [
        Judged("0", "0", True, "q0", 4, 2),  # seeds 0 to 3
        Judged("1", "no", False, "q1", 4, 0),
        Judged("2", "2", True, "q2", 4, 1),  # seeds 8 to 11
    ]
    assert [row.passed for row in found["two"]] == [2]
    greedy = evaluate([a_set("one", "0")], Completer(), Tokenizer(), scorer, 9)
    assert greedy["one"] == [Judged("0", "0", True, "q0")]
    assert pass_at(greedy["one"]) == {}


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 2), (6, 6), (8, 1)])
def test_pass_at_k_is_the_share_of_all_ways_to_draw(n, c):
    rights = [i < c for i in range(n)]
    found = pass_at([Judged("", "", False, "", n, c)])
    assert list(found) == sorted({k for k in (1, 2, 4, 8) if k <= n} | {n})
    for k, share in found.items():
        ways = list(itertools.combinations(rights, k))
        assert share == pytest.approx(sum(map(any, ways)) / len(ways))
