"""The preflight's intervals and verdicts, by hand."""

import pytest

from sdft_dist.preflight import compare, interval, verdict


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
