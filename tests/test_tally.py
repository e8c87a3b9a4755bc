"""What micro-batches add up to."""

from types import SimpleNamespace

import pytest
import torch

from learner.fused import Losses
from learner.tally import Tally, done


def part(per_token, lengths, skip, importance):
    losses = Losses(
        total=torch.tensor(0.5, requires_grad=True) * 2,
        per_token=None if per_token is None else torch.tensor(per_token),
        label_logprobs=torch.full((len(importance),), -1.0),
        importance=torch.tensor(importance),
    )
    behaviour = torch.tensor([-1.25] + (len(importance) - 1) * [-1.0])
    batch = SimpleNamespace(
        weights=torch.full((len(importance),), 0.25), targets=SimpleNamespace(behaviour_T=behaviour)
    )
    return done(losses, batch, lengths, skip)


def test_micro_batches_add_up_over_tokens_and_positions():
    tally = Tally()
    for found in (part([1.0, 2.0, 4.0], [3, 2], 1, [1.0, 1.0, 2.0]), part([8.0], [2], 1, [1.0])):
        assert not found.losses.total.requires_grad, "else its graph is kept until the step's end"
        tally.add(found)
    metrics = tally.metrics()
    assert (metrics["loss"], metrics["trained_tokens"], metrics["divergence_per_token"]) == (2.0, 4, 15 / 4)
    assert metrics["divergence_by_position"] == [None, (1 + 4 + 8) / 3, 2.0]
    assert (metrics["logprob_difference_mean"], metrics["logprob_difference_max"]) == (0.5 / 4, 0.25)
    assert metrics["effective_sample_share"] == pytest.approx(5**2 / (4 * 7))


def test_without_losses_by_token_the_divergence_is_the_loss_without_its_weights():
    tally = Tally()
    tally.add(part(None, [2], 0, [1.0, 1.0]))
    assert tally.metrics()["divergence_per_token"] == 1.0 / 0.25 / 2
    assert tally.metrics()["divergence_by_position"] == []
