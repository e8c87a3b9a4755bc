"""The loop with fakes at its four boundaries."""

import numpy as np
import pytest

from sdft_dist.config import parse_config
from sdft_dist.data import ProblemSet
from sdft_dist.errors import Diverged, UserError
from sdft_dist.loop import batch_keys, train, uncut
from sdft_dist.runlog import RunLog, read_metrics
from sdft_dist.types import Problem, SampleKey, SampleRef, TrainItem


class Fakes:
    """All four boundaries; writes down what is asked of it."""

    def __init__(self, loss=1.0):
        self.calls, self.loss = [], loss

    def generate(self, keys):
        self.calls.append(("generate", len(keys)))
        return [
            SampleRef(
                key=k, num_prompt_tokens=3, num_completion_tokens=4, finish_reason="stop", policy_versions=(), ref=None
            )
            for k in keys
        ]

    def score(self, samples):
        self.calls.append(("score", len(samples)))
        return [TrainItem(key=s.key, num_prompt_tokens=3, num_completion_tokens=4, teacher_version=0) for s in samples]

    def update(self, step, num_steps, items):
        self.calls.append(("update", step, [i.num_completion_tokens for i in items]))
        return {"loss": self.loss, "grad_norm": 1.0, "divergence_per_token": 1.0}

    def to_generators(self, version):
        self.calls.append(("push generators", version))

    def to_teachers(self, version):
        self.calls.append(("push teachers", version))


def config(**overrides):
    tree = {"model": {"path": "m"}, "data": {"train": "d"}, "steps": 2, "rollout": {"prompts_per_step": 2}}
    return parse_config(tree | overrides)


@pytest.fixture
def problems():
    ids = np.arange(3)
    return ProblemSet([Problem(prompt_ids=ids, teacher_prompt_ids=ids, demonstration_ids=np.arange(5))] * 5)


def run(config, problems, tmp_path):
    fakes, after = Fakes(), []
    with RunLog(tmp_path, title="test") as log:
        train(config, problems, fakes, fakes, fakes, fakes, log, after_step=after.append)
    return fakes.calls, after


def test_sdft_pushes_before_it_samples_and_samples_before_it_learns(problems, tmp_path):
    calls, after = run(config(), problems, tmp_path)
    step = [("generate", 2), ("score", 2)]
    assert calls == [
        ("push teachers", 0),
        ("push generators", 0),
        *step,
        ("update", 0, [4, 4]),
        ("push teachers", 1),
        ("push generators", 1),
        *step,
        ("update", 1, [4, 4]),
        ("push teachers", 2),
        ("push generators", 2),
    ]
    assert after == [0, 1, 2]
    assert [m["step"] for m in read_metrics(tmp_path, "train")] == [1, 2]


def test_sft_imitates_the_demonstrations(problems, tmp_path):
    calls, _ = run(config(method="sft"), problems, tmp_path)
    assert ("update", 0, [5, 5]) in calls
    assert not [c for c in calls if c[0] in ("generate", "score")]


def test_teachers_are_pushed_every_sync_every_steps(problems, tmp_path):
    calls, _ = run(config(steps=4, teacher={"sync_every": 3}), problems, tmp_path)
    assert [c[1] for c in calls if c[0] == "push teachers"] == [0, 3]


def test_keys_are_unique_also_when_a_small_data_set_repeats(problems):
    keys = batch_keys(config(rollout={"prompts_per_step": 12, "completions_per_prompt": 2}), problems, 0)
    assert len(keys) == len(set(keys)) == 24


def test_cut_completions_are_kept_dropped_or_refused():
    def ref(reason):
        return SampleRef(
            key=SampleKey(3, 7, 0), num_prompt_tokens=1, num_completion_tokens=2, finish_reason=reason,
            policy_versions=(), ref=None,
        )  # fmt: skip

    samples = [ref("stop"), ref("length"), ref("stop")]
    policies = {p: config(rollout={"cut_completions": p}) for p in ("keep", "drop", "error")}
    assert len(uncut(policies["keep"], samples)) == 3
    assert len(uncut(policies["drop"], samples)) == 2
    with pytest.raises(UserError, match="1 of 3 completions of step 3 were cut"):
        uncut(policies["error"], samples)
    with pytest.raises(UserError, match="2 of 2 completions"):
        uncut(policies["drop"], [ref("length")] * 2)


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_pushed(problems, tmp_path):
    fakes = Fakes(loss=float("nan"))
    with RunLog(tmp_path, title="test") as log, pytest.raises(Diverged, match="step 0: loss is nan"):
        train(config(), problems, fakes, fakes, fakes, fakes, log, after_step=lambda step: None)
    assert fakes.calls[-1][0] == "update"
