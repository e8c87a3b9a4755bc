"""`sdft fields` says of each field what config.py says."""

import pytest

from sdft_dist.errors import UserError
from sdft_dist.fields import describe


def test_a_field_with_its_values_default_and_meaning():
    assert describe("rollout.top_p", width=60) == (
        "rollout.top_p: number > 0 ≤ 1; default 1.0\n"
        "    Nucleus sampling. Not with loss.importance, whose\n"
        "    weights it would bias."
    )
    assert describe("judge.retries", width=200).startswith("eval.judge.retries: whole number ≥ 0; default 5\n")
    assert describe("data.limit", width=200).startswith("data.limit: whole number ≥ 1; default null\n")
    assert describe("model.path", width=200).startswith("model.path: text; required\n")
    assert describe("teacher.kind", width=200).startswith('teacher.kind: base | ema | live; default "ema"\n')


def test_a_word_chooses_and_none_is_all():
    names = [line.partition(":")[0] for line in describe("lora", width=200).splitlines() if not line.startswith(" ")]
    assert names == ["model.lora.rank", "model.lora.alpha", "model.lora.targets"]
    every = describe("", width=100)
    assert every.startswith("method: ")
    assert "\ncheckpoint.grace_s: number > 0; default 60.0\n" in every
    with pytest.raises(UserError, match="no field has 'stalness' in its name"):
        describe("stalness", width=100)
