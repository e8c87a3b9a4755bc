import pytest
from helpers import config_of

from sdft_dist.config import EvalConfig
from sdft_dist.errors import ConfigError
from sdft_dist.selection import best, exhausted, exported


def settings(**fields):
    return EvalConfig(every=1, sets={"new": "n", "old": "o"}, **({"metric": "new"} | fields))


def records(*values, old=0.5):
    return [{"step": step, "new": value, "old": old} for step, value in enumerate(values)]


def test_the_first_of_the_best_evaluations_counts():
    assert best(settings(), records(0.1, 0.4, 0.9, 0.9, 0.3))["step"] == 2


def test_the_mean_is_over_all_sets():
    found = [{"step": 1, "new": 1.0, "old": 0.1}, {"step": 2, "new": 0.8, "old": 0.8}]
    assert best(settings(metric="mean"), found)["step"] == 2


def test_the_start_is_no_candidate():
    assert best(settings(), records(1.0, 0.2, 0.3))["step"] == 2
    assert best(settings(), records(1.0)) is None


@pytest.mark.parametrize(
    ("values", "ends"),
    [((0, 0.5), False), ((0, 0.5, 0.5), False), ((0, 0.5, 0.5, 0.4), True), ((0, 0.5, 0.4, 0.6), False)],
)
def test_a_run_ends_after_so_many_evaluations_without_a_better_one(values, ends):
    assert exhausted(settings(patience=2), records(*values)) is ends


def test_without_patience_a_run_never_ends_early():
    assert not exhausted(settings(), records(0, 0.5, 0.4, 0.3, 0.2, 0.1))


def test_what_is_exported_is_the_best_or_the_last():
    found = records(0, 0.5, 0.9, 0.1)
    assert exported(settings(keep_best=True), found)["step"] == 2
    assert exported(settings(), found)["step"] == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": None}, "eval.metric"),
        ({"metric": "nwe"}, "'nwe', expected one of new, old, mean"),
        ({"every": 0}, "eval.metric: .* and eval.every"),
    ],
)
def test_selection_needs_a_metric_that_is_measured(fields, message):
    tree = {"every": 2, "sets": {"new": "n", "old": "o"}, "metric": "new", "patience": 1} | fields
    with pytest.raises(ConfigError, match=message):
        config_of(eval=tree)


def test_the_best_is_saved_only_with_its_teacher():
    tree = {"every": 3, "sets": {"new": "n"}, "metric": "new", "keep_best": True}
    with pytest.raises(ConfigError, match=r"eval.keep_best: .* teacher.sync_every=2"):
        config_of(teacher={"sync_every": 2}, eval=tree)


def test_evaluations_from_before_a_set_was_added_are_no_candidates():
    found = [{"step": 1, "new": 0.9}, *records(0, 0, 0.1)[2:]]
    assert best(settings(metric="mean"), found)["step"] == 2
    assert best(settings(), found)["step"] == 1
    assert not exhausted(settings(metric="mean", patience=1), found)
