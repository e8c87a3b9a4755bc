"""Divergences and their closed-form gradients against autograd in float64, and by hand."""

import math

import pytest
import torch
from helpers import assert_relative

from learner.objective import DIVERGENCES, cross_entropy, forward_kl, reverse_kl


def reference(name, student, teacher):
    logp, logq = student.log_softmax(-1), teacher.log_softmax(-1)
    p, q = logp.exp(), logq.exp()
    return {"forward_kl": (q * (logq - logp)).sum(-1), "reverse_kl": (p * (logp - logq)).sum(-1)}[name]


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_value_and_gradient_agree_with_autograd_in_float64(name):
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 7, 31)
    exact = student.double().requires_grad_()
    value = reference(name, exact, teacher.double())
    value.sum().backward()
    got, grad = DIVERGENCES[name](student.clone(), teacher.clone())
    assert_relative(got, value.detach())
    assert_relative(grad, exact.grad)


def test_two_token_vocabulary_by_hand():
    p, q = [0.5, 0.5], [0.8, 0.2]
    student, teacher = torch.tensor([p]).log(), torch.tensor([q]).log()
    forward = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    reverse = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    value, grad = forward_kl(student.clone(), teacher.clone())
    assert value.item() == pytest.approx(forward, abs=1e-6)
    assert grad[0].tolist() == pytest.approx([0.5 - 0.8, 0.5 - 0.2], abs=1e-6)
    assert reverse_kl(student.clone(), teacher.clone())[0].item() == pytest.approx(reverse, abs=1e-6)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_same_distribution_has_no_loss_and_no_gradient(name):
    logits = torch.randn(4, 9)
    value, grad = DIVERGENCES[name](logits.clone(), logits.clone())
    assert value.abs().max() < 1e-6
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_a_token_that_both_rule_out_gives_no_nan(name):
    student, teacher = torch.randn(2, 3, 5)
    student[:, 2] = teacher[:, 2] = -math.inf
    value, grad = DIVERGENCES[name](student, teacher)
    assert value.isfinite().all()
    assert grad.isfinite().all()


def test_cross_entropy_is_torchs():
    logits, labels = torch.randn(6, 11, dtype=torch.float64), torch.randint(0, 11, (6,))
    exact = logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    expected.sum().backward()
    value, grad = cross_entropy(logits.clone(), labels)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(grad, exact.grad)
