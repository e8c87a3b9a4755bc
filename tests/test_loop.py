"""The loop with fakes at its boundaries."""

import numpy as np
import pytest
from helpers import config_of

from sdft_dist.errors import Diverged, UserError
from sdft_dist.loop import batch_keys, cut_share, fresh, train, uncut
from sdft_dist.problems import ProblemSet
from sdft_dist.runlog import RunLog, read_metrics
from sdft_dist.types import Problem, SampleKey, Span, TrainItem


def item(key, *, policy_version=0, finish_reason="stop"):
    return TrainItem(
        key=key, num_prompt_tokens=3, num_completion_tokens=4, teacher_version=0, finish_reason=finish_reason,
        policy_version=policy_version,
    )  # fmt: skip


class Fakes:
    """All boundaries; writes down what is asked of it."""

    def __init__(self, loss=1.0, lag=0):
        self.calls, self.loss, self.lag = [], loss, lag

    def submit(self, keys):
        self.calls.append(("submit", keys[0].step, len(keys)))

    def take(self, keys):
        self.calls.append(("take", keys[0].step, len(keys)))
        return [item(key, policy_version=max(0, key.step - self.lag)) for key in keys]

    def update(self, step, num_steps, items):
        self.calls.append(("update", step, [i.num_completion_tokens for i in items]))
        return {"loss": self.loss, "grad_norm": 1.0, "divergence_per_token": 1.0}

    def to_generators(self, version):
        self.calls.append(("push generators", version))

    def to_teachers(self, version):
        self.calls.append(("push teachers", version))


def config(**overrides):
    return config_of(**({"steps": 2, "rollout": {"prompts_per_step": 2}} | overrides))


@pytest.fixture
def problems():
    ids = np.arange(3)
    return ProblemSet([Problem(prompt_ids=ids, teacher_prompt_ids=ids, demonstration_ids=np.arange(5))] * 5)


def run(config, problems, tmp_path, **faking):
    fakes, after = Fakes(**faking), []
    with RunLog(tmp_path, title="test") as log:
        train(config, problems, fakes, fakes, fakes, log, after_step=after.append)
    return fakes.calls, after


def test_training_ends_where_after_step_says_so(problems, tmp_path):
    fakes, after = Fakes(), []
    with RunLog(tmp_path, title="test") as log:
        train(config(steps=5), problems, fakes, fakes, fakes, log, after_step=lambda n: after.append(n) or n == 3)
    assert after == [0, 1, 2, 3]


def test_sdft_pushes_before_it_samples_and_samples_before_it_learns(problems, tmp_path):
    calls, after = run(config(), problems, tmp_path)
    assert calls == [
        ("push teachers", 0),
        ("push generators", 0),
        ("submit", 0, 2),
        ("take", 0, 2),
        ("update", 0, [4, 4]),
        ("push teachers", 1),
        ("push generators", 1),
        ("submit", 1, 2),
        ("take", 1, 2),
        ("update", 1, [4, 4]),
        ("push teachers", 2),
        ("push generators", 2),
    ]
    assert after == [0, 1, 2]
    assert [m["step"] for m in read_metrics(tmp_path, "train")] == [1, 2]


def test_the_decode_batch_is_a_mean_over_the_time_in_which_generators_decode(tmp_path):
    metrics = {"loss": 1.0, "divergence_per_token": 0.1, "cut_share": 0.0}
    with RunLog(tmp_path, title="test") as log:
        for spans in ([Span("decode", 0, 3, 8.0), Span("decode", 3, 4, 4.0)], [Span("decode", 4, 6, 2.0)], []):
            for span in spans:
                log.span("generator", 0, span)
            log.span("teacher", 0, Span("score", 0, 9))
            log.step(1, 3, metrics, [item(SampleKey(0, 0, 0))])
    assert [m.get("decode_batch_mean") for m in read_metrics(tmp_path, "train")] == [7.0, 2.0, None]


def test_sft_imitates_the_demonstrations(problems, tmp_path):
    calls, _ = run(config(method="sft"), problems, tmp_path)
    assert ("update", 0, [5, 5]) in calls
    assert not [c for c in calls if c[0] in ("submit", "take")]


def test_teachers_are_pushed_every_sync_every_steps(problems, tmp_path):
    calls, _ = run(config(steps=4, teacher={"sync_every": 3}), problems, tmp_path)
    assert [c[1] for c in calls if c[0] == "push teachers"] == [0, 3]


def test_keys_are_unique_also_when_a_small_data_set_repeats(problems):
    keys = batch_keys(config(rollout={"prompts_per_step": 12, "completions_per_prompt": 2}), problems, 0)
    assert len(keys) == len(set(keys)) == 24


@pytest.mark.fault("completion cut at its limit", "fake samples", "kept, dropped or refused, as asked; counted")
def test_cut_completions_are_kept_dropped_or_refused():
    key = SampleKey(3, 7, 0)
    samples = [item(key), item(key, finish_reason="length"), item(key)]
    assert cut_share(samples) == pytest.approx(1 / 3)
    policies = {p: config(rollout={"cut_completions": p}) for p in ("keep", "drop", "error")}
    assert len(uncut(policies["keep"], samples)) == 3
    assert len(uncut(policies["drop"], samples)) == 2
    with pytest.raises(UserError, match="1 of 3 completions of step 3 were cut"):
        uncut(policies["error"], samples)
    with pytest.raises(UserError, match="2 of 2 completions"):
        uncut(policies["drop"], [item(key, finish_reason="length")] * 2)


@pytest.mark.fault("NaN, again and again", "fake learner", "counted; exit 5 with the rows after optim.max_skipped")
def test_steps_without_finite_numbers_are_left_out_counted_and_at_last_an_error(problems, tmp_path):
    fakes = Fakes(loss=float("nan"))
    settings = config(steps=9, optim={"max_skipped": 2})
    told = []
    with (
        RunLog(tmp_path, title="test", on_samples=lambda step, items, bad: told.append((step, len(items), bad))) as log,
        pytest.raises(Diverged, match=r"step 2: loss is nan, .* the 3. step in a row .*counted from 0: \[\d, \d\]"),
    ):
        train(settings, problems, fakes, fakes, fakes, log, after_step=lambda step: None)
    assert [m["skipped"] for m in read_metrics(tmp_path, "train")] == [1, 1]
    assert [m["loss"] for m in read_metrics(tmp_path, "train")] == [None, None], "JSON knows no NaN"
    assert ("push generators", 2) in fakes.calls, "the run went on"
    assert told == [(1, 2, True), (2, 2, True), (3, 2, True)], "their samples are written down"


def test_rollouts_of_later_steps_are_in_flight_up_to_the_staleness_allowed(problems, tmp_path):
    calls, _ = run(config(steps=4, rollout={"prompts_per_step": 2, "max_staleness": 2}), problems, tmp_path, lag=2)
    order = [c[:2] for c in calls if c[0] in ("submit", "take", "push generators")]
    assert order == [
        ("push generators", 0), ("submit", 0), ("submit", 1), ("submit", 2), ("take", 0),
        ("push generators", 1), ("submit", 3), ("take", 1),
        ("push generators", 2), ("take", 2), ("push generators", 3), ("take", 3), ("push generators", 4),
    ]  # fmt: skip


@pytest.mark.fault("rollout too stale", "old versions", "dropped and counted")
def test_samples_that_are_too_stale_are_dropped_and_counted():
    allowed = config(rollout={"max_staleness": 1})
    key = SampleKey(3, 0, 0)
    items = [item(key, policy_version=v) for v in (3, 2, 1)]
    assert [i.policy_version for i in fresh(allowed, 3, items)] == [3, 2]
    with pytest.raises(RuntimeError, match=r"all 1 samples are older than rollout\.max_staleness=1.*of version 1"):
        fresh(allowed, 3, items[2:])
