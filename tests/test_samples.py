"""Samples as text; the tokenizer is made up, the object store is not asked."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import config_of
from ray.exceptions import ObjectLostError

from sdft_dist import samples
from sdft_dist.data import Row
from sdft_dist.inputs import Inputs
from sdft_dist.problems import ProblemSet
from sdft_dist.types import Piece, Problem, Sample, SampleKey, TrainItem, VersionSpan


def ids(*numbers):
    return np.array(numbers, dtype=np.int32)


@pytest.fixture
def inputs():
    """Rows 0 and 2 of three."""
    problems = ProblemSet(
        Problem(prompt_ids=ids(i), teacher_prompt_ids=ids(i, i), demonstration_ids=ids(i, 9)) for i in (0, 2)
    )
    rows = [Row(messages=[], demonstration=[], answer=None, where=f"r.jsonl:{i + 1}") for i in range(3)]
    decode = lambda tokens, skip_special_tokens=False: " ".join(map(str, tokens))  # noqa: E731
    return Inputs(
        tokenizer=SimpleNamespace(decode=decode),
        rows=rows,
        problems=problems,
        kept=[rows[0], rows[2]],
        dropped=["r.jsonl:2: is too long"],
        truncated=[],
        stop_ids=[],
    )


def item(problem, sampled=True):
    return TrainItem(
        key=SampleKey(4, problem, 0),
        num_prompt_tokens=1,
        num_completion_tokens=2,
        teacher_version=0,
        sample=Piece("list", problem) if sampled else None,
    )


def found(pieces, timeout_s):
    return [
        Sample(
            key=SampleKey(4, piece.row, 0),
            completion_ids=ids(7, 8),
            logprobs=np.array([-1.0, -2.0], dtype=np.float32),
            finish_reason="stop",
            policy_versions=(VersionSpan(3, 0, 1), VersionSpan(4, 1, 2)),
        )
        for piece in pieces
    ]


def test_each_names_its_row_and_what_the_teacher_was_shown(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "fetch", found)
    path = tmp_path / "samples" / "step-000004.jsonl"
    samples.write_samples(path, inputs, [item(0), item(1)])
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == {
        "row": "r.jsonl:1",
        "prompt": "0",
        "demonstration": "0 9",
        "completion": "7 8",
        "finish_reason": "stop",
        "policy_versions": [3, 4],
        "logprob_per_token": -1.5,
    }
    assert second["row"] == "r.jsonl:3", "rows that were left out count"


def test_nothing_is_written_where_nothing_was_sampled_or_it_is_gone(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "fetch", found)
    samples.write_samples(tmp_path / "samples" / "a", inputs, [item(0, sampled=False)])

    def gone(pieces, timeout_s):
        raise ObjectLostError("id", "address", "stack")

    monkeypatch.setattr(samples, "fetch", gone)
    samples.write_samples(tmp_path / "samples" / "a", inputs, [item(0)])
    assert not (tmp_path / "samples").exists()


def test_they_are_due_at_the_first_step_and_where_it_is_evaluated_or_else_saved():
    saved = config_of(checkpoint={"every": 4})
    evaluated = config_of(checkpoint={"every": 4}, eval={"every": 3, "sets": {"new": "f"}})
    assert [step for step in range(1, 10) if samples.is_due(saved, step)] == [1, 4, 8]
    assert [step for step in range(1, 10) if samples.is_due(evaluated, step)] == [1, 3, 6, 9]
