"""Samples or demonstrations to one packed MicroBatch, with the weight of every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from learner.fused import Targets
from learner.model import MicroBatch
from sdft_dist.config import LossConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSequence:
    """One sequence to train on; numpy int32, and the teacher's states where there is a teacher."""

    prompt_ids: np.ndarray  # [P]
    completion_ids: np.ndarray  # [C]
    teacher_states: torch.Tensor | None  # [C, D]


def trained_tokens(num_completion_tokens: int, loss: LossConfig) -> int:
    """Completion tokens that carry loss."""
    return max(0, num_completion_tokens - loss.skip_first_tokens)


def token_weight(num_completion_tokens: int, loss: LossConfig, *, total_tokens: int, total_sequences: int) -> float:
    """Weight of each trained token of one sequence, by the global counts of the step.

    The sum over all ranks and micro-batches is 1, so packing and ranks do not change the loss.
    """
    if loss.normalisation == "tokens":
        return 1.0 / max(1, total_tokens)
    own = trained_tokens(num_completion_tokens, loss)
    return 1.0 / (max(1, own) * max(1, total_sequences))


def build(
    sequences: Sequence[TrainSequence],
    weights: Sequence[float],
    loss: LossConfig,
    *,
    teacher_head: torch.Tensor | None,
    device: torch.device,
) -> MicroBatch:
    """Pack `sequences`; an empty list gives one token without loss, so that collectives stay aligned."""
    ids, positions, predicts, labels, token_weights, states = [], [], [], [], [], []
    offset, skip = 0, loss.skip_first_tokens
    for s, weight in zip(sequences, weights, strict=True):
        p, c = len(s.prompt_ids), len(s.completion_ids)
        ids.append(np.concatenate([s.prompt_ids, s.completion_ids]))
        positions.append(np.arange(p + c))
        if c > skip:
            # The output at position i predicts the token at i + 1.
            predicts.append(np.arange(offset + p - 1 + skip, offset + p + c - 1))
            labels.append(s.completion_ids[skip:])
            token_weights.append(np.full(c - skip, weight, dtype=np.float32))
            if s.teacher_states is not None:
                states.append(s.teacher_states[skip:])
        offset += p + c
    if teacher_head is None:
        targets = Targets(labels_T=_long(labels, device))
    else:
        width = teacher_head.shape[1]
        stacked = torch.cat(states) if states else torch.zeros(0, width)
        targets = Targets(
            states_TD=stacked.to(device, teacher_head.dtype), head_VD=teacher_head, divergence=loss.divergence
        )
    return MicroBatch(
        input_ids=_long(ids or [np.zeros(1, np.int64)], device)[None],
        position_ids=_long(positions or [np.zeros(1, np.int64)], device)[None],
        predicts=_long(predicts, device),
        weights=torch.from_numpy(np.concatenate([*token_weights, np.zeros(0, np.float32)])).to(device),
        targets=targets,
    )


def _long(parts: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    joined = np.concatenate([*parts, np.zeros(0, np.int64)]).astype(np.int64)
    return torch.from_numpy(joined).to(device)
