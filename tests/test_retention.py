import pytest

from sdft_dist.continual.retention import normalised, retention

STAGES = [
    {"a": 0.0, "b": 0.1, "c": 0.2, "old": 1.0},
    {"a": 0.9, "b": 0.3, "c": 0.2, "old": 0.9},
    {"a": 0.7, "b": 0.8, "c": 0.5, "old": 0.8},
    {"a": 0.8, "b": 0.6, "c": 1.0, "old": 0.6},
]


def test_measures_by_hand():
    assert retention(["a", "b", "c"], ["old"], STAGES) == pytest.approx(
        {
            "average": (0.8 + 0.6 + 1.0) / 3,
            "forgetting": ((0.9 - 0.8) + (0.8 - 0.6)) / 2,
            "backward transfer": ((0.8 - 0.9) + (0.6 - 0.8)) / 2,
            "forward transfer": ((0.3 - 0.1) + (0.5 - 0.2)) / 2,
            "prior, start": 1.0,
            "prior, end": 0.6,
        }
    )


def test_what_was_learned_again_is_not_counted_as_forgotten_but_its_best_is():
    stages = [{"a": 0.0, "b": 0.0}, {"a": 0.5, "b": 0.0}, {"a": 0.9, "b": 0.0}]
    assert retention(["a", "b"], [], stages)["forgetting"] == pytest.approx(0.5 - 0.9), "a got better meanwhile"


def test_one_task_has_nothing_to_forget():
    found = retention(["a"], [], [{"a": 0.0}, {"a": 0.9}])
    assert found.pop("average") == 0.9
    assert set(found.values()) == {None}


def test_an_unfinished_sequence_counts_what_was_taught():
    found = retention(["a", "b", "c"], [], STAGES[:3])
    assert found["average"] == pytest.approx((0.7 + 0.8) / 2)
    assert found["backward transfer"] == pytest.approx(0.7 - 0.9)


def test_the_normalised_scale():
    assert normalised(0.5, 0.0, 1.0) == 0.5
    assert normalised(0.1, 0.2, 0.6) == pytest.approx(-0.25)
    assert normalised(0.9, 0.9, 0.9) is None
