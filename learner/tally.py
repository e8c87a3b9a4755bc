"""What the micro-batches of a step add up to, on one rank and over all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from learner.fused import Losses
from learner.model import MicroBatch
from sdft_dist.types import Span
from sdft_dist.watch import NUM_DECILES, NUM_FIRST, position_bin

NUM_BINS = NUM_FIRST + NUM_DECILES


class Done(NamedTuple):
    """What is counted of a micro-batch. Tensors stay on their device until the step's end: to ask a GPU for a number is
    to wait for it, and the next micro-batch would be made while it stands idle."""

    losses: Losses  # detached
    weights: torch.Tensor
    behaviour: torch.Tensor | None
    bins: np.ndarray  # of each trained token, int64


def done(losses: Losses, batch: MicroBatch, lengths: Sequence[int], skip: int) -> Done:
    """Of completions of `lengths` tokens, the first `skip` of each untrained."""
    bins = np.array([position_bin(i, n) for n in lengths for i in range(skip, n)], dtype=np.int64)
    return Done(losses._replace(total=losses.total.detach()), batch.weights, batch.targets.behaviour_T, bins)


@dataclass(kw_only=True, slots=True)
class Tally:
    """Sums over trained tokens; two tallies add up to that of both."""

    loss: float = 0.0  # this rank's share of the step's loss
    tokens: int = 0
    divergence: float = 0.0  # Σ loss before weights
    by_position: np.ndarray = field(default_factory=lambda: np.zeros((2, NUM_BINS)))  # Σ loss, tokens
    difference: float = 0.0  # Σ |learner's − generator's log-prob|, nats
    difference_max: float = 0.0
    importance: float = 0.0  # Σ w
    importance_squares: float = 0.0  # Σ w²

    def add(self, part: Done) -> None:
        """Count one micro-batch."""
        losses = part.losses
        self.loss += losses.total.item()
        self.tokens += len(losses.importance)
        if losses.per_token is not None:
            per_token = losses.per_token.double().cpu().numpy()
            self.divergence += float(per_token.sum())
            self.by_position[0] += np.bincount(part.bins, weights=per_token, minlength=NUM_BINS)
            self.by_position[1] += np.bincount(part.bins, minlength=NUM_BINS)
        elif len(part.weights):
            self.divergence += losses.total.item() / part.weights[0].item()  # they are all equal
        if losses.label_logprobs is not None and part.behaviour is not None and len(part.behaviour):
            difference = (losses.label_logprobs - part.behaviour).abs()
            self.difference += difference.sum().item()
            self.difference_max = max(self.difference_max, difference.max().item())
        self.importance += losses.importance.sum().item()
        self.importance_squares += losses.importance.square().sum().item()

    def __add__(self, other: Tally) -> Tally:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Tally(**{**sums, "difference_max": max(self.difference_max, other.difference_max)})

    def metrics(self) -> dict[str, Any]:
        """Means over the trained tokens. `divergence_by_position` has None where there was no token."""
        n, (sums, counts) = max(1, self.tokens), self.by_position
        used = int(np.max(np.nonzero(counts)[0], initial=-1)) + 1
        return {
            "loss": self.loss,
            "divergence_per_token": self.divergence / n,
            "trained_tokens": self.tokens,
            "divergence_by_position": [s / c if c else None for s, c in zip(sums[:used], counts[:used], strict=True)],
            "logprob_difference_mean": self.difference / n,
            "logprob_difference_max": self.difference_max,
            "effective_sample_share": self.importance**2 / (n * self.importance_squares) if self.tokens else 1.0,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMetrics:
    """One rank's account of one optimizer step."""

    tally: Tally
    grad_norm: float  # global, before clipping
    learning_rate: float
    slots: int  # token positions that the model processed, free ones counted in
    spans: tuple[Span, ...]
