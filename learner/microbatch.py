"""Samples or demonstrations to one packed MicroBatch, with the weight of every token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from learner.fused import Targets
from learner.model import MicroBatch
from sdft_dist.config import Config
from sdft_dist.types import TeacherTargets

Layout = Callable[[Sequence[int]], list[list[int]]]  # lengths to rows of sequences


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSequence:
    """One sequence to train on; a demonstration has neither log-probs nor a teacher."""

    prompt_ids: np.ndarray  # int32 [P]
    completion_ids: np.ndarray  # int32 [C]
    logprobs: np.ndarray | None = None  # float32 [C], when they were sampled
    teacher: TeacherTargets | None = None


def trained_tokens(num_completion_tokens: int, config: Config) -> int:
    """Completion tokens that carry loss."""
    return max(0, num_completion_tokens - config.skipped_tokens)


def token_weight(num_completion_tokens: int, config: Config, *, total_tokens: int, total_sequences: int) -> float:
    """Weight of each trained token of one sequence, by the global counts of the step.

    The sum over all ranks and micro-batches is 1, so packing and ranks do not change the loss.
    """
    if config.loss.normalisation == "tokens":
        return 1.0 / max(1, total_tokens)
    own = trained_tokens(num_completion_tokens, config)
    return 1.0 / (max(1, own) * max(1, total_sequences))


def build(
    sequences: Sequence[TrainSequence],
    weights: Sequence[float],
    skip: int,
    *,
    teacher_heads: Mapping[int, torch.Tensor] | None,
    layout: Layout,
    device: torch.device,
) -> MicroBatch:
    """Pack `sequences` into the rows that `layout` gives for their lengths, without loss on the first `skip`
    tokens of each completion. `teacher_heads` are the heads for the teacher's states by version, where it
    sent states; sequences of one version must follow one another.

    An empty list gives one token without loss, so that the ranks' collectives stay aligned.
    """
    trained = [(i, s) for i, s in enumerate(sequences) if len(s.completion_ids) > skip]
    laid = _lay(sequences, layout)
    # The output at one position predicts the token at the next.
    predicts = [
        laid.starts[i] + np.arange(len(s.prompt_ids) - 1 + skip, len(s.prompt_ids) + len(s.completion_ids) - 1)
        for i, s in trained
    ]
    counts = [len(s.completion_ids) - skip for _, s in trained]
    long, floats = (partial(_joined, dtype=dtype, device=device) for dtype in (np.int64, np.float32))
    teachers = [s.teacher for _, s in trained if s.teacher is not None]
    targets = Targets(
        labels_T=long([s.completion_ids[skip:] for _, s in trained]),
        behaviour_T=floats([s.logprobs[skip:] for _, s in trained if s.logprobs is not None]),
        sequence_T=long([np.full(n, k) for k, n in enumerate(counts)]),
        states_TD=None if teacher_heads is None else _states(teachers, skip, next(iter(teacher_heads.values()))),
        heads=() if teacher_heads is None else _heads(teachers, skip, teacher_heads),
        ids_TK=long([t.ids[skip:] for t in teachers if t.ids is not None]),
        logprobs_TK=floats([t.logprobs[skip:] for t in teachers if t.logprobs is not None]),
        tail_T=floats([t.tail[skip:] for t in teachers if t.tail is not None]),
    )
    return MicroBatch(
        input_ids=_sent(torch.from_numpy(laid.input_ids), device),
        position_ids=_sent(torch.from_numpy(laid.position_ids), device),
        bounds=_sent(torch.from_numpy(laid.bounds), device),
        longest=int(np.diff(laid.bounds).max()),
        predicts=long(predicts),
        weights=floats([np.full(n, weights[i]) for (i, _), n in zip(trained, counts, strict=True)]),
        targets=targets,
    )


class _Laid(NamedTuple):
    """Sequences in R rows of L slots; places are counted over all slots, row by row."""

    input_ids: np.ndarray  # int64 [R, L]
    position_ids: np.ndarray  # int64 [R, L], from 0 in each sequence
    starts: list[int]  # of each sequence
    bounds: np.ndarray  # int32, where sequences, and the free slots at rows' ends, start and end


def _lay(sequences: Sequence[TrainSequence], layout: Layout) -> _Laid:
    lengths = [len(s.prompt_ids) + len(s.completion_ids) for s in sequences]
    rows = layout(lengths)
    slots = max(1, max((sum(lengths[i] for i in row) for row in rows), default=1))
    input_ids, position_ids = np.zeros((2, max(1, len(rows)), slots), dtype=np.int64)
    starts, bounds = [0] * len(sequences), {0, input_ids.size}
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            end = at + lengths[i]
            input_ids[r, at:end] = np.concatenate([sequences[i].prompt_ids, sequences[i].completion_ids])
            # Free slots go on counting: they come last, so no token of a sequence sees them.
            position_ids[r, at:] = np.arange(slots - at)
            starts[i] = r * slots + at
            bounds.add(r * slots + end)
            at = end
        bounds.add((r + 1) * slots)
    return _Laid(input_ids, position_ids, starts, np.array(sorted(bounds), dtype=np.int32))


def _heads(
    teachers: Sequence[TeacherTargets], skip: int, heads: Mapping[int, torch.Tensor]
) -> tuple[tuple[int, torch.Tensor], ...]:
    """Where the states of each version end, and its head."""
    out, end = [], 0
    for version, group in groupby(teachers, key=lambda t: t.teacher_version):
        end += sum(len(t.states[skip:]) for t in group if t.states is not None)
        out.append((end, heads[version]))
    return tuple(out)


def _states(teachers: Sequence[TeacherTargets], skip: int, head: torch.Tensor) -> torch.Tensor:
    """Teacher states [T, D] in the head's type."""
    parts = [t.states[skip:] for t in teachers if t.states is not None]
    if not parts:
        return torch.zeros(0, head.shape[1], dtype=head.dtype, device=head.device)
    joined = torch.from_numpy(np.concatenate(parts))
    return _sent(joined.view(torch.bfloat16) if teachers[0].dtype == "bfloat16" else joined, head.device).to(head.dtype)


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On `device`, without waiting for what a GPU is at: only from pinned memory does it take things by itself."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _joined(parts: Sequence[np.ndarray], dtype: type, device: torch.device) -> torch.Tensor:
    return _sent(torch.from_numpy(np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)), device)
