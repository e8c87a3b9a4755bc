"""Accuracy and pass@k; the model is made up."""

import importlib
import itertools
import sys

import numpy as np
import pytest
from helpers import config_of, write_jsonl

from sdft_dist.config import EvalConfig
from sdft_dist.errors import ConfigError, DataError, ScorerFailed
from sdft_dist.evaluate import EvalSet, Judged, evaluate, load_eval_sets, load_scorer, pass_at, summary
from sdft_dist.judge import Case
from sdft_dist.prompts import load_tokenizer


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


def test_what_was_thought_is_no_part_of_an_answer_and_what_is_cut_is_counted():
    class Thinks(Completer):
        def complete(self, prompts, max_tokens, seeds=None):
            return [["<think>", 1, "</think>", "</think>", 7], ["<think>", 7]]

    found = evaluate([a_set("one", "7", "7")], Thinks(), Tokenizer(), load_scorer(EvalConfig()), 5)
    assert found["one"] == [
        Judged("<think> 1 </think> </think> 7", "7", True, "q0", cut=True),
        Judged("<think> 7", "7", False, "q1"),
    ]
    assert summary(found)["one_cut_share"] == 0.5


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 2), (6, 6), (8, 1)])
def test_pass_at_k_is_the_share_of_all_ways_to_draw(n, c):
    rights = [i < c for i in range(n)]
    found = pass_at([Judged("", "", False, "", n, c)])
    assert list(found) == sorted({k for k in (1, 2, 4, 8) if k <= n} | {n})
    for k, share in found.items():
        ways = list(itertools.combinations(rights, k))
        assert share == pytest.approx(sum(map(any, ways)) / len(ways))


def test_pass_at_k_is_the_mean_over_rows():
    judged = [Judged("", "", False, "", 2, passed) for passed in (0, 1, 2)]
    assert pass_at(judged) == {1: pytest.approx(0.5), 2: pytest.approx(2 / 3)}


def loaded(model, rows, tmp_path, name="new", **fields):
    sets = {name: str(rows if isinstance(rows, str) else write_jsonl(tmp_path / "held.jsonl", rows))}
    config = config_of(
        model={"path": str(model), "max_length": 64},
        rollout={"max_completion_tokens": 16},
        eval={"sets": sets, **fields},
    )
    return load_eval_sets(config, load_tokenizer(config))


def test_held_out_rows_that_cannot_be_judged_are_refused(model, tmp_path):
    good = {"prompt": "rev a0", "answer": "a0"}
    (found,) = loaded(model, [good], tmp_path)
    assert (found.name, found.questions, found.answers) == ("new", ["rev a0"], ["a0"])
    for rows, message in [
        ([good, good | {"prompt": "a0 " * 55}], r"held.jsonl:2: prompt of 58 tokens \+ .* is 74, above"),
        ([good, good | {"answer": None, "demonstration": "d"}], r"held.jsonl:2: answer: is missing"),
        ([good, good | {"answer": "\ud800"}], r"held.jsonl:2: answer: holds half a surrogate pair"),
        (str(tmp_path / "none.jsonl"), r"eval.sets.new: .*none.jsonl: no such file"),
    ]:
        with pytest.raises(DataError, match=message):
            loaded(model, rows, tmp_path)
    with pytest.raises(DataError, match=r"held.jsonl:1: answer: is 'a0'; expected a list of"):
        loaded(model, [good], tmp_path, scorer="sdft_dist.scorers:tool_calls")
    with pytest.raises(DataError, match=r"held.jsonl:1: answer: is 'a0'; expected one letter, A to Z"):
        loaded(model, [good], tmp_path, scorer="sdft_dist.scorers:letter")
    with pytest.raises(ConfigError, match=r"eval.scorer: 'nothing:here' is not a function"):
        loaded(model, [good], tmp_path, scorer="nothing:here")


@pytest.mark.parametrize(
    ("scorer", "hint"),
    [
        ("letter", "did you mean sdft_dist.scorers:letter?"),
        ("scorers:text", "did you mean sdft_dist.scorers:text?"),
        ("exact_match", "did you mean sdft_dist.evaluate:exact_match?"),
    ],
)
def test_a_scorer_without_its_module_is_named_with_it(scorer, hint):
    with pytest.raises(ConfigError) as e:
        load_scorer(EvalConfig(scorer=scorer))
    why = "No module named" if ":" in scorer else "it has no colon"
    assert str(e.value).startswith(f"eval.scorer: {scorer!r} is not a function as module:function: {why}")
    assert str(e.value).endswith(hint)
    load_scorer(EvalConfig(scorer=hint.split()[-1].rstrip("?")))


@pytest.mark.parametrize(
    "name", ["step", "kind", "attempt", "seconds", "num_steps", "judge_calls", "a_interval", "a_pass@1", "a_cut_share"]
)
def test_a_set_does_not_overwrite_a_field_of_the_record(model, tmp_path, name):
    with pytest.raises(ConfigError, match=f"eval.sets.{name}: an evaluation's record has a field of that name"):
        loaded(model, [{"prompt": "rev a0", "answer": "a0"}], tmp_path, name=name)


@pytest.fixture
def scorer_of(monkeypatch, tmp_path):
    """A function `mine` of a module, with these parameters and this value, as a scorer."""

    def make(parameters, value="True"):
        (tmp_path / "own.py").write_text(f"def mine({parameters}):\n    return {value}\n")
        monkeypatch.delitem(sys.modules, "own", raising=False)
        importlib.invalidate_caches()
        return load_scorer(EvalConfig(scorer="own:mine"))

    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it would be as old as the next module of that name
    monkeypatch.syspath_prepend(tmp_path)
    return make


@pytest.mark.parametrize("error", ["KeyError('x')", "FileNotFoundError('f')", "TimeoutError('of its endpoint')"])
def test_a_function_that_fails_is_told_with_the_row(scorer_of, error):
    score = scorer_of("completion, answer", f"(_ for _ in ()).throw({error})")
    told = f"^eval.scorer: own:mine: {error.partition('(')[0]}: .*; on the completion 'c' and the answer 'a'$"
    with pytest.raises(ScorerFailed, match=told):
        score([Case("q", "c", "a")])


@pytest.mark.parametrize("third", ["prompt", "question", "prompt=None", "question, /", "prompt, limit=3"])
def test_a_function_may_want_the_prompt(scorer_of, third):
    name = third.split(",")[0].split("=")[0]
    scorer = scorer_of(f"completion, answer, {third}", f"completion in {name}")
    assert scorer([Case("four?", "four", ""), Case("a", "b", "")]) == [True, False]


@pytest.mark.parametrize("third", ["limit=0.1", "*, limit=0.1", "*, prompt=None, limit=0.1", "limit=0.1, more=2"])
def test_a_parameter_with_a_default_of_its_own_keeps_it(scorer_of, third):
    scorer = scorer_of(f"completion, answer, {third}", "abs(float(completion) - float(answer)) < limit")
    assert scorer([Case("?", "1.05", "1"), Case("?", "1.2", "1")]) == [True, False]


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ("completion", "too many positional arguments"),
        ("completion, answer, *, limit", "missing a required.* argument: 'limit'"),
        ("completion, answer, prompt, row", "missing a required argument: 'row'"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_at_load(scorer_of, parameters, why):
    with pytest.raises(ConfigError, match=rf"^eval\.scorer: 'own:mine' cannot be called with .*: {why}; give other"):
        scorer_of(parameters)
