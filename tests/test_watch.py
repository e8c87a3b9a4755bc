"""Each sign of trouble is told once, with the setting to change."""

import pytest

from sdft_dist.types import SampleKey, TrainItem
from sdft_dist.watch import NUM_DECILES, NUM_FIRST, Watch, item_metrics, length_signs, position_bin

OPENING = [5.0, 5.0, 5.0] + [0.1] * 29
FINE = {"completion_tokens_mean": 100.0, "cut_share": 0.0, "empty_share": 0.0}


@pytest.mark.parametrize(
    ("trouble", "setting"),
    [
        ({"cut_share": 0.5}, "rollout.max_completion_tokens"),
        ({"empty_share": 0.5}, "chat template"),
        ({"logprob_difference_mean": 0.5}, "loss.importance=token"),
        ({"effective_sample_share": 0.2}, "loss.importance_clip"),
        ({"trained_tokens": 0}, "loss.skip_first_tokens"),
        ({"divergence_by_position": OPENING, "staleness_mean": 0.0}, "loss.skip_first_tokens=3"),
    ],
)
def test_signs(trouble, setting):
    watch = Watch()
    assert watch.step(FINE) == []
    (told,) = watch.step(FINE | trouble)
    assert setting in told
    assert watch.step(FINE | trouble) == []


def test_the_opening_of_demonstrations_is_to_be_imitated():
    """What plain fine-tuning reads was not sampled, and no first tokens of it are left out."""
    assert Watch().step(FINE | {"divergence_by_position": OPENING}) == []


def test_first_tokens_that_are_skipped_already_are_not_advised_to_be_skipped():
    skipped = [None, None, None, *OPENING]
    assert Watch().step(FINE | {"divergence_by_position": skipped, "staleness_mean": 0.0}) == []


def test_short_completions_have_no_opening():
    """Of nine tokens, as in the lab, the first three are the answer's own."""
    assert Watch().step(FINE | {"divergence_by_position": OPENING[:9], "staleness_mean": 0.0}) == []


def test_held_out_completions_that_are_cut_are_told_once_by_set():
    watch = Watch()
    assert watch.evaluation({"new": 0.6, "new_cut_share": 0.5, "old_cut_share": 0.0}) == []
    (told,) = watch.evaluation({"new_cut_share": 0.6, "old_cut_share": 0.0})
    assert told.startswith("60% of the completions on new are cut, and judged as they are: raise eval.max_completion")
    assert watch.evaluation({"new_cut_share": 0.6}) == []


def test_a_skill_that_is_lost_is_told_once_where_intervals_are_apart():
    def record(new, old):
        sets = {"new": new, "old": old}
        return sets | {f"{name}_interval": [value - 0.1, value + 0.1] for name, value in sets.items()}

    watch = Watch()
    assert watch.evaluation(record(0.1, 0.8)) == []
    assert watch.evaluation(record(0.9, 0.7)) == []
    (told,) = watch.evaluation(record(0.6, 0.3))
    assert told.startswith("accuracy on old has fallen from 80% to 30%: lower optim.learning_rate, or train for fewer")
    assert watch.evaluation(record(0.1, 0.1)) == []


@pytest.mark.parametrize(("first", "grown"), [(0.0, True), (0.9, False)])
def test_completions_that_end_no_more_may_come_of_the_rate(first, grown):
    watch = Watch()
    told = [*watch.step(FINE | {"cut_share": first}), *watch.step(FINE | {"cut_share": 1.0})]
    assert len(told) == 1
    assert ("At first it was 0%: " in told[0] and "lower optim.learning_rate" in told[0]) == grown


def test_length_drift():
    watch = Watch()
    for _ in range(20):
        assert watch.step(FINE) == []
    told = [text for _ in range(20) for text in watch.step(FINE | {"completion_tokens_mean": 250.0})]
    assert len(told) == 1
    assert "drifts" in told[0]


def test_positions():
    assert [position_bin(i, 132) for i in (0, 31, 32, 41, 42, 131)] == [0, 31, 32, 32, 33, 41]
    assert position_bin(40, 41) < NUM_FIRST + NUM_DECILES


def test_item_metrics_by_hand():
    def item(length, reason):
        return TrainItem(
            key=SampleKey(0, 0, 0), num_prompt_tokens=1, num_completion_tokens=length, teacher_version=0,
            finish_reason=reason,
        )  # fmt: skip

    found = item_metrics(3, [item(1, "stop"), item(9, "length"), item(5, "stop"), item(5, "stop")])
    assert found == {"completion_tokens_mean": 5, "empty_share": 0.25}


def test_a_warm_up_that_outlasts_the_run_is_told():
    assert length_signs(11, 10) == []
    (text,) = length_signs(8, 10)
    assert "8 steps" in text
    assert "optim.warmup_steps" in text
