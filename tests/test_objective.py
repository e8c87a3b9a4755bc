"""Divergences over categories by hand and against autograd in float64."""

import math

import pytest
import torch
from helpers import assert_relative, by_formula

from learner.objective import FLOOR, divergence

NAMES = ("forward_kl", "reverse_kl", "jsd")


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_agree_with_autograd_in_float64(name, beta):
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 7, 31)
    exact = student.double().requires_grad_()
    value = by_formula(name, exact.softmax(-1), teacher.double().softmax(-1), beta)
    value.sum().backward()
    got, grad = divergence(name, beta)(student.log_softmax(-1), teacher.log_softmax(-1))
    assert_relative(got, value.detach())
    assert_relative(grad, exact.grad)


def test_two_categories_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.8, 0.2]])
    forward = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    reverse = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    middle = 0.4 * math.log(0.8 / 0.65) + 0.1 * math.log(0.2 / 0.35)
    middle += 0.25 * math.log(0.5 / 0.65) + 0.25 * math.log(0.5 / 0.35)
    value, grad = divergence("forward_kl", 0.5)(p.log(), q.log())
    assert value.item() == pytest.approx(forward, abs=1e-6)
    assert grad[0].tolist() == pytest.approx([0.5 - 0.8, 0.5 - 0.2], abs=1e-6)
    assert divergence("reverse_kl", 0.5)(p.log(), q.log())[0].item() == pytest.approx(reverse, abs=1e-6)
    assert divergence("jsd", 0.5)(p.log(), q.log())[0].item() == pytest.approx(middle, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_ruled_out_categories_give_no_nan(name):
    logits = torch.randn(2, 3, 5)
    logits[:, :, 2] = -math.inf  # both
    logits[0, 1, 4] = -math.inf  # only one of them, each way
    logits[1, 2, 4] = -math.inf
    student, teacher = logits.log_softmax(-1).clamp(min=FLOOR)
    value, grad = divergence(name, 0.5)(student, teacher)
    assert not value.isnan().any()
    assert not grad.isnan().any()
    assert value[0].isfinite()
    assert grad[0].isfinite().all()
