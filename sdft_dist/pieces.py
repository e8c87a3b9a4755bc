"""Lists of records that an actor answers with, and what the driver holds of each record.

An actor returns its answer and, as further return values, the lists: so the driver owns them, never opens them, and
they outlive the actor that made them. Whoever works on a record fetches its list.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from sdft_dist.types import Piece, Problem, Sample, SampleRef, TrainItem


def split(records: Sequence[Any], number: int) -> tuple[list[Piece], list[list[Any]]]:
    """`records` in `number` lists of about equal length, and the place of each one."""
    ends = [len(records) * i // number for i in range(number + 1)]
    lists = [list(records[start:end]) for start, end in pairwise(ends)]
    return [Piece(i, row) for i, own in enumerate(lists) for row in range(len(own))], lists


def bound(handles: Sequence[Any], refs: Sequence[Any]) -> list[Any]:
    """An answer's SampleRefs or TrainItems with `refs` in the place of the lists' numbers. Their last field is the
    record's place in one of the lists."""
    return [h._make((*h[:-1], Piece(refs[h[-1].ref], h[-1].row))) for h in handles]


def fetch(pieces: Sequence[Piece], timeout_s: float | None = None) -> list[Any]:
    """The records that `pieces` name, in order; each object is fetched once. Raises RayError where one is lost, or has
    not come within `timeout_s`."""
    import ray

    refs = list(dict.fromkeys(piece.ref for piece in pieces))
    objects = dict(zip(refs, ray.get(refs, timeout=timeout_s), strict=True))
    return [objects[piece.ref][piece.row] for piece in pieces]


def sample_refs(samples: Sequence[Sample], problems: Sequence[Problem]) -> list[SampleRef]:
    """What the driver holds of `samples`, which are one list."""
    return [
        SampleRef(
            key=sample.key,
            num_prompt_tokens=len(problems[sample.key.problem].prompt_ids),
            num_completion_tokens=len(sample.completion_ids),
            finish_reason=sample.finish_reason,
            policy_versions=sample.policy_versions,
            sample=Piece(0, row),
        )
        for row, sample in enumerate(samples)
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
