"""The chunked head + loss against one plain computation in float64, and its padding and chunks."""

import pytest
import torch
from helpers import assert_relative

from learner import fused
from learner.fused import Targets, weighted_loss

T, V, D, PADDED = 13, 29, 8, 32


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    states, head = torch.randn(T, D), torch.randn(PADDED, D)
    teacher_states, teacher_head = torch.randn(T, D), torch.randn(PADDED, D)
    return states, head, torch.rand(T), teacher_states, teacher_head


def plain(divergence, states, head, weights, teacher_states, teacher_head, temperature):
    logp = (states @ head[:V].T / temperature).log_softmax(-1)
    logq = (teacher_states @ teacher_head[:V].T / temperature).log_softmax(-1)
    a, b = (logq, logp) if divergence == "forward_kl" else (logp, logq)
    return ((a.exp() * (a - b)).sum(-1) * weights).sum()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_agrees_with_plain_float64_in_many_chunks(inputs, divergence, temperature, monkeypatch):
    monkeypatch.setattr(fused, "chunk_size", lambda vocab_size: 4)
    exact = [x.double() for x in inputs]
    exact[0].requires_grad_(), exact[1].requires_grad_()
    expected = plain(divergence, *exact, temperature)
    expected.backward()
    states, head = inputs[0].requires_grad_(), inputs[1].requires_grad_()
    targets = Targets(states_TD=inputs[3], head_VD=inputs[4], divergence=divergence)
    loss, losses = weighted_loss(states, head, inputs[2], targets, vocab_size=V, temperature=temperature)
    loss.backward()
    assert_relative(loss, expected.detach())
    torch.testing.assert_close((losses * inputs[2]).sum(), loss.detach())
    assert_relative(states.grad, exact[0].grad)
    assert_relative(head.grad, exact[1].grad)


def test_padded_vocabulary_rows_take_no_part(inputs):
    states, head, weights, teacher_states, teacher_head = inputs
    head.requires_grad_()
    for poisoned in (head.data, teacher_head):
        poisoned[V:] = 1e4
    targets = Targets(states_TD=teacher_states, head_VD=teacher_head)
    loss, _ = weighted_loss(states, head, weights, targets, vocab_size=V)
    loss.backward()
    assert loss < 1e3
    assert head.grad[V:].abs().max() == 0


def test_no_tokens_give_zero_loss_and_zero_gradients():
    states, head = torch.zeros(0, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    targets = Targets(labels_T=torch.zeros(0, dtype=torch.int64))
    loss, losses = weighted_loss(states, head, torch.zeros(0), targets, vocab_size=V)
    loss.backward()
    assert loss.item() == 0
    assert len(losses) == 0
    assert head.grad.abs().max() == 0
