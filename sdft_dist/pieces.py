"""Records into Ray's object store and out of it, and what the driver holds of them: small ones share an object,
because each costs a fixed price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sdft_dist.types import Piece, Problem, Sample, SampleRef, TrainItem

OBJECT_BYTES = 1 << 20  # an object is closed when it holds this much


def put(records: Sequence[Any]) -> list[Piece]:
    """One Piece for each record (a dataclass with numpy fields), in order."""
    import ray

    pieces: list[Piece] = []
    pending: list[Any] = []
    size = 0
    for i, record in enumerate(records):
        pending.append(record)
        size += _num_bytes(record)
        if size >= OBJECT_BYTES or i == len(records) - 1:
            ref = ray.put(pending)
            pieces += [Piece(ref, row) for row in range(len(pending))]
            pending, size = [], 0
    return pieces


def fetch(pieces: Sequence[Piece]) -> list[Any]:
    """The records that `pieces` name, in order; each object is fetched once."""
    import ray

    refs = list(dict.fromkeys(piece.ref for piece in pieces))
    objects = dict(zip(refs, ray.get(refs), strict=True))
    return [objects[piece.ref][piece.row] for piece in pieces]


def sample_refs(samples: Sequence[Sample], problems: Sequence[Problem]) -> list[SampleRef]:
    """Put `samples`; what the driver holds of each."""
    return [
        SampleRef(
            key=sample.key,
            num_prompt_tokens=len(problems[sample.key.problem].prompt_ids),
            num_completion_tokens=len(sample.completion_ids),
            finish_reason=sample.finish_reason,
            policy_versions=sample.policy_versions,
            sample=piece,
        )
        for sample, piece in zip(samples, put(samples), strict=True)
    ]


def train_items(refs: Sequence[SampleRef], targets: Sequence[Piece], teacher_version: int) -> list[TrainItem]:
    """What the learner trains on, with a teacher's targets for each of `refs`."""
    return [
        TrainItem(
            key=ref.key,
            num_prompt_tokens=ref.num_prompt_tokens,
            num_completion_tokens=ref.num_completion_tokens,
            teacher_version=teacher_version,
            finish_reason=ref.finish_reason,
            policy_version=min(span.version for span in ref.policy_versions),
            sample=ref.sample,
            targets=piece,
        )
        for ref, piece in zip(refs, targets, strict=True)
    ]


def _num_bytes(record: Any) -> int:
    values = (getattr(record, name) for name in record.__dataclass_fields__)
    return sum(value.nbytes for value in values if isinstance(value, np.ndarray))
