"""Scorers on cases that a person has judged, and on real rows."""

import json
import os
import random
from pathlib import Path

import pytest

from sdft_dist.config import EvalConfig
from sdft_dist.evaluate import Judged, accuracy, interval, load_scorer
from sdft_dist.judge import Case
from sdft_dist.scorers import letter, letter_answer, text, tool_calls, tool_calls_answer

REAL = os.environ.get("SDFT_REAL_DATA")

LETTERS = [
    ("<answer>\nD\n</answer>", "D", True),
    ("<answer>D</answer>", "D", True),
    ("<ANSWER> d </ANSWER>", "D", True),
    ("<answer>D: 2713.000</answer>", "D", True),
    ("<answer>(D)</answer>", "D", True),
    ("<answer>**D**</answer>", "D", True),
    ("<reasoning>A is wrong, <answer>B</answer> no</reasoning><answer>C</answer>", "C", True),
    ("<answer>Dog</answer>", "D", False),
    ("<answer></answer>", "D", False),
    ("<answer>none of them</answer> The answer is D", "D", False),
    ("<answer>C</answer>", "D", False),
    ("<answer>D", "D", False),
    ("The answer is D.", "D", True),
    ("The correct answer is (B), since it is heavier.", "B", True),
    ("**Answer: B**", "B", True),
    ("answer: option C", "C", True),
    ("Option A is wrong. The right choice is B", "B", True),
    ("First I thought the answer is A, but the answer is C", "C", True),
    ("\\boxed{B}", "B", True),
    ("so \\boxed{\\text{B}}", "B", True),
    ("D", "D", True),
    (" D. ", "D", True),
    ("A dog has four legs", "A", False),
    ("The answer is a matter of taste", "A", False),
    ("I don't know", "A", False),
    ("", "A", False),
    ("A, B or C", "A", False),
]

ONE = '[{"Action": "find", "Action_Input": "{\\"a\\": 1, \\"b\\": {\\"c\\": [1, 2]}}"}]'
TWO = '[{"Action": "f", "Action_Input": "{}"}, {"Action": "g", "Action_Input": "{\\"x\\": \\"1\\"}"}]'
CALLS = [
    ('Action: find\nAction Input: {"a": 1, "b": {"c": [1, 2]}}', ONE, True),
    ('Thought: easy\nAction: find\nAction Input: {"b": {"c": [1, 2]}, "a": 1}', ONE, True),
    ('Action: find\nAction Input: {"a": 1.0, "b": {"c": [1, 2]}}\nObservation: x', ONE, True),
    ('  Action:   find  \n\nAction Input:\n{\n "a": 1,\n "b": {"c": [1, 2]}}', ONE, True),
    ('Action: find\nAction_Input: {"a": 1, "b": {"c": [1, 2]}}', ONE, True),
    ('Action: find\nAction Input: {"a": 1, "b": {"c": [2, 1]}}', ONE, False),
    ('Action: find\nAction Input: {"a": "1", "b": {"c": [1, 2]}}', ONE, False),
    ('Action: find\nAction Input: {"a": 1}', ONE, False),
    ('Action: find\nAction Input: {"a": 1, "b": {"c": [1, 2]}, "d": null}', ONE, False),
    ('Action: Find\nAction Input: {"a": 1, "b": {"c": [1, 2]}}', ONE, False),
    ('Action: find\nAction Input: {"a": 1, "b": {"c": [1, 2]}', ONE, False),
    ("Action: find\nAction Input: {'a': 1, 'b': {'c': [1, 2]}}", ONE, False),
    ("Action: find\nAction Input:", ONE, False),
    ("Action: find", ONE, False),
    ('find {"a": 1, "b": {"c": [1, 2]}}', ONE, False),
    ("", ONE, False),
    ('Action: f\nAction Input: {}\nAction: g\nAction Input: {"x": "1"}', TWO, True),
    ('Action: g\nAction Input: {"x": "1"}\nAction: f\nAction Input: {}', TWO, False),
    ("Action: f\nAction Input: {}", TWO, False),
    (
        'Action: f\nAction Input: {}\nAction: g\nAction Input: {"x": "1"}\nAction: g\nAction Input: {"x": "1"}',
        TWO,
        False,
    ),
    ('Action: f\nAction Input: {"x"\nAction: g\nAction Input: {"x": "1"}', TWO, False),
    ("Action: f\nAction Input: {}", "Action: f\nAction Input: {}", True),
]

TEXTS = [
    (" Paris.", "paris", True),
    ("New\n  York", "new york", True),
    ("ﬁne", "fine", True),
    ("New York City", "New York", False),
    ("", "x", False),
]


@pytest.mark.parametrize(("completion", "answer", "right"), LETTERS)
def test_letters(completion, answer, right):
    assert letter(completion, answer) is right


@pytest.mark.parametrize(("completion", "answer", "right"), CALLS)
def test_tool_calls(completion, answer, right):
    assert tool_calls(completion, answer) is right


@pytest.mark.parametrize(("completion", "answer", "right"), TEXTS)
def test_texts(completion, answer, right):
    assert text(completion, answer) is right


@pytest.mark.skipif(not REAL, reason="SDFT_REAL_DATA names no folder with real rows")
@pytest.mark.parametrize(
    ("name", "scorer", "chance"), [("science", "letter", (0.15, 0.35)), ("tooluse", "tool_calls", (0.0, 0.1))]
)
def test_real_rows_score_full_marks_on_their_own_answers_and_chance_on_others(name, scorer, chance):
    score_all = load_scorer(EvalConfig(scorer=f"sdft_dist.scorers:{scorer}"))
    rows = [json.loads(line) for line in (Path(REAL) / f"{name}.jsonl").open()]
    if name == "science":
        pairs = [(row["output_text"], row["answer"]) for row in rows]
    else:
        pairs = [("\n".join(row["golden_response"]), json.dumps(row["golden_answer"])) for row in rows]
    assert all(score_all([Case("", *pair) for pair in pairs]))
    answers = [answer for _, answer in pairs]
    random.Random(0).shuffle(answers)
    shuffled = [Case("", completion, answer) for (completion, _), answer in zip(pairs, answers, strict=True)]
    share = sum(score_all(shuffled)) / len(pairs)
    print(f"{name}: shuffled answers {100 * share:.0f}%")
    assert chance[0] <= share <= chance[1]


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (81, 263, 0.2553, 0.3662)],
)
def test_the_interval_of_an_accuracy(right, rows, low, high):
    """The last row is Newcombe's example (Stat. Med. 17, 1998)."""
    judged = [Judged("", "", i < right) for i in range(rows)]
    assert accuracy(judged) == right / rows
    assert interval(judged) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("text", ["[" * 3000, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, "9" * 5000])
def test_whatever_a_model_writes_is_only_wrong(text):
    assert tool_calls(f"Action: find\nAction Input: {text}", ONE) is False


def test_deep_calls_are_compared_or_wrong():
    deep = "[" * 400 + "]" * 400
    assert tool_calls(f"Action: f\nAction Input: {deep}", f'[{{"Action": "f", "Action_Input": {deep}}}]') is True


def test_thousands_of_spaces_take_no_time():
    """Not by a clock: a pattern that tries all ways to split them takes an hour."""
    spaces = " " * 20_000
    assert letter(f"<answer>{spaces}", "A") is False
    assert letter(f"<answer>{spaces}A{spaces}</answer>", "A") is True
    assert tool_calls(f"Action:{spaces}\n", ONE) is False
    assert tool_calls(f"Action:{spaces}f{spaces}\nAction Input: {{}}", '[{"Action": "f", "Action_Input": {}}]') is True


@pytest.mark.parametrize(
    "answer",
    ["", "5", "[]", "null", "find", "[5]", '[{"Action": "f"}]', '[{"Action": 1, "Action_Input": "{}"}]',
     '[{"Action": "f", "Action_Input": "{"}]', '{"Action": "f", "Action_Input": "{}"}', "Action: f\nAction Input: {"],
)  # fmt: skip
def test_an_answer_that_no_completion_can_match_is_refused(answer):
    with pytest.raises(ValueError, match=r"is '.*'; expected a list of"):
        tool_calls_answer(answer)


@pytest.mark.parametrize("answer", ["", " ", "3", "(B)", "B.", "B. Paris", "Paris", "AB", "A\nB", "Ä", "ß", "Α"])
def test_an_answer_that_is_no_letter_is_refused(answer):
    with pytest.raises(ValueError, match=r"^is '.*'; expected one letter, A to Z$"):
        letter_answer(answer)


@pytest.mark.parametrize("answer", ["d", " D\n", "d "])
def test_a_letter_may_be_small_and_have_space_around_it(answer):
    assert letter_answer(answer) == "D"
    assert letter("<answer>D</answer>", answer) is True
