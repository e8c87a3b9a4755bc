"""The preflight's intervals and verdicts, by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from helpers import config_of, tiny_model, write_jsonl

from sdft_dist import preflight
from sdft_dist.errors import UserError
from sdft_dist.preflight import compare, interval, verdict
from sdft_dist.problems import ProblemSet
from sdft_dist.types import Problem


def test_interval_by_hand():
    found = interval([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.high - found.mean == pytest.approx(1.96 * 1.2909944 / 2)
    assert found.rows == 4


@pytest.mark.parametrize(
    ("student", "teacher", "start"),
    [
        ([0.0] * 20, [1.0] * 18 + [0.0] * 2, "SDFT is likely to help"),
        ([1.0] * 20, [0.0] * 18 + [1.0] * 2, "SDFT is likely to hurt"),
        ([0.0, 1.0] * 10, [1.0, 0.0] * 10, "No gain from the demonstration is seen"),
    ],
)
def test_verdicts(student, teacher, start):
    measured = compare(student, teacher)
    assert verdict(measured, None).startswith(start)


def test_accuracy_decides_over_likelihood():
    copied, useless = compare([0.0] * 9, [1.0] * 9), compare([0.0, 1.0] * 5, [1.0, 0.0] * 5)
    assert verdict(copied, useless).startswith("No gain")


def test_one_row_has_no_interval_and_no_verdict():
    measured = compare([0.0], [1.0])
    assert (measured.gain.low, measured.gain.high) == (None, None)
    assert verdict(measured, None).startswith("One row cannot tell")
    assert "+1.000, of one row" in verdict(measured, None)


def test_what_a_run_would_refuse_is_refused_before_engines_start(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "ray_session", lambda config: pytest.fail("started"))
    good = {"prompt": "rev a0", "demonstration": "a0", "answer": "a0"}
    sections = {
        "model": {"path": str(tiny_model(tmp_path / "model")), "max_length": 64},
        "data": {"train": str(write_jsonl(tmp_path / "d.jsonl", [good]))},
        "rollout": {"max_completion_tokens": 16},
    }
    for evaluation, message in [
        ({"sets": {"new": str(tmp_path / "none.jsonl")}}, r"eval.sets.new: .*no such file"),
        ({"scorer": "nothing:here"}, "eval.scorer"),
        ({"scorer": "sdft_dist.scorers:tool_calls"}, r"d.jsonl:1: answer: is 'a0'"),
    ]:
        with pytest.raises(UserError, match=message):
            preflight.preflight(config_of(**sections, eval=evaluation))
    with pytest.raises(UserError, match="bfloat16 is for GPUs, and torch sees none"):
        preflight.preflight(config_of(**sections | {"model": {**sections["model"], "dtype": "bfloat16"}}))


def test_log_probs_are_compared_of_samples_among_all_tokens(tmp_path, monkeypatch):
    """The learner knows nothing of what top_p and top_k leave out."""
    started = []
    monkeypatch.setattr(preflight, "launch", lambda config, *_, **__: started.append(config))
    monkeypatch.setattr(preflight, "ray_session", lambda config: None)
    config = config_of(
        model={"path": str(tiny_model(tmp_path / "model")), "max_length": 64},
        data={"train": str(write_jsonl(tmp_path / "d.jsonl", [{"prompt": "rev a0", "demonstration": "a0"}]))},
        rollout={"max_completion_tokens": 16, "top_p": 0.5, "top_k": 3, "temperature": 0.7},
    )
    with pytest.raises(TypeError):  # of what stands for Ray
        preflight.preflight(config)
    (used,) = (config.rollout for config in started)
    assert (used.top_p, used.top_k, used.temperature) == (1.0, 0, 0.7)


def test_a_demonstration_is_compared_as_far_as_the_context_holds_it():
    asked = []

    def logprobs(prompts, targets, temperature):
        asked.extend(len(p) + len(t) for p, t in zip(prompts, targets, strict=True))
        return [np.full(len(t), -float(len(p))) for p, t in zip(prompts, targets, strict=True)]

    fleet = SimpleNamespace(learner=SimpleNamespace(logprobs=logprobs))
    problem = Problem(prompt_ids=np.zeros(10), teacher_prompt_ids=np.zeros(40), demonstration_ids=np.zeros(30))
    found = preflight._likelihood(fleet, ProblemSet([problem]), 64)
    assert asked == [10 + 24, 40 + 24]
    assert found.gain.mean == -30
