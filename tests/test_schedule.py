"""The learning rate by hand."""

import pytest

from learner.schedule import learning_rate
from sdft_dist.config import OptimConfig


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_by_hand(schedule, expected):
    optim = OptimConfig(learning_rate=1.0, warmup_steps=2, schedule=schedule)
    assert [learning_rate(optim, n, 6) for n in range(6)] == pytest.approx(expected, abs=1e-6)
