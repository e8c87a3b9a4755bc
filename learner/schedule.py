"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from sdft_dist.config import OptimConfig


def learning_rate(optim: OptimConfig, step: int, num_steps: int) -> float:
    """Rate for optimizer step `step` (counted from 0): linear warm-up, then constant, linear to 0, or
    half a cosine to 0, over the remaining of `num_steps`."""
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.learning_rate
    done = (step - optim.warmup_steps) / max(1, num_steps - optim.warmup_steps)
    left = 1 - done if optim.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return optim.learning_rate * left
