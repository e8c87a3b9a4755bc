"""The fp32 average of a slow drift, beside what a bf16 average would have given."""

import pytest
import torch

from learner.ema import Ema
from learner.zero import Fragment

RATE, STEPS, DRIFT = 0.01, 1000, 1e-4


def test_a_drift_of_1000_steps_in_fp32_and_in_bf16(capsys):
    """Each weight moves by 1e-4 in all. In bf16 most updates are below half a step and vanish."""
    torch.manual_seed(0)
    start = 0.02 * torch.randn(20_000)  # the size of a model's weights
    direction = torch.where(torch.rand(20_000) < 0.5, -DRIFT, DRIFT)
    student = start.clone()
    fragment = Fragment(name="w", start=0, master=student, state={})
    ema, exact, half = Ema([fragment]), start.double(), start.bfloat16()
    half_start = half.float()
    for step in range(STEPS):
        student.copy_(start + direction * (step + 1) / STEPS)
        ema.update([fragment], RATE)
        exact += RATE * (student.double() - exact)
        half += (RATE * (student.bfloat16() - half)).bfloat16()

    def moved(average, origin):
        """Mean movement along the drift, as a share of the exact one."""
        return float(((average.double() - origin.double()) * direction.sign()).mean() / expected)

    expected = ((exact - start.double()) * direction.sign()).mean()
    fp32, bf16 = moved(ema.averages["w"][1], start), moved(half, half_start)
    with capsys.disabled():
        print(
            f"\nEMA of a {STEPS}-step drift at rate {RATE}, moved as far as the exact one: "
            f"fp32 {100 * fp32:.1f}%, bf16 {100 * bf16:.1f}%"
        )
    assert fp32 == pytest.approx(1, abs=0.01)
    assert abs(bf16) < 0.2


def test_an_anchor_is_where_the_average_starts():
    fragment = Fragment(name="w", start=2, master=torch.zeros(3), state={})
    ema = Ema([fragment], anchor={"w": torch.arange(8.0).reshape(2, 4)})
    assert ema.averages["w"][1].tolist() == [2, 3, 4]
    ema.update([fragment], 0.5)
    assert ema.averages["w"][1].tolist() == [1, 1.5, 2]
