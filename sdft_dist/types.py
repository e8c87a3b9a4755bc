"""Frozen records that cross processes.

Arrays are numpy, so that Ray's object store hands them over without a copy. Records named *Ref hold
metadata and an object reference: they are all that the driver ever touches of a sample. What the driver
handles by the thousand is a NamedTuple: frozen dataclasses with slots are pickled by Python code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

FinishReason = Literal["stop", "length"]
TransportKind = Literal["gloo", "nccl", "ipc"]  # of a weight push; see transport.py


class SampleKey(NamedTuple):
    """What a sample is of: it names one rollout in one run, and decides its random seed."""

    step: int  # optimizer step that will consume it
    problem: int  # index into the ProblemSet
    sample: int  # 0 .. completions_per_prompt - 1


class VersionSpan(NamedTuple):
    """Tokens [start, end) of a completion were sampled by this policy version."""

    version: int
    start: int
    end: int


class Piece(NamedTuple):
    """One record among those that share an object of Ray's store: small records travel together."""

    ref: Any  # ObjectRef of a list of records; in an actor's answer the number of that list, see pieces.py
    row: int


class Span(NamedTuple):
    """Something that an actor did, for the account of who works and who waits."""

    what: str
    start: float  # seconds since the epoch
    end: float
    batch: float = 0.0  # of a generator: requests that it decoded at a time, mean


OnSpan = Callable[[str, int, Span], None]  # role, index of the actor, what it did


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One demonstration as token ids."""

    prompt_ids: np.ndarray  # int32 [P], the student's view, ends with the generation prompt
    teacher_prompt_ids: np.ndarray  # int32 [P'], the teacher's view, same ending
    demonstration_ids: np.ndarray  # int32 [D], ends with the end-of-turn token, unless it was shortened


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One student completion."""

    key: SampleKey
    completion_ids: np.ndarray  # int32 [C]
    logprobs: np.ndarray  # float32 [C], of the sampled tokens at the sampling temperature, nats
    finish_reason: FinishReason
    policy_versions: tuple[VersionSpan, ...]  # cover [0, C) without gaps
    top_ids: np.ndarray | None = None  # int32 [C, K], the student's likeliest, where the loss is taken there


class SampleRef(NamedTuple):
    """The driver's handle on a Sample."""

    key: SampleKey
    num_prompt_tokens: int
    num_completion_tokens: int
    finish_reason: FinishReason
    policy_versions: tuple[VersionSpan, ...]
    sample: Piece  # the Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherTargets:
    """What the teacher believes at each completion position of one sample: its states, or
    log-probabilities at chosen ids with the mass of all others."""

    key: SampleKey
    teacher_version: int
    dtype: Literal["float32", "bfloat16"]  # of `states`
    states: np.ndarray | None = None  # [C, D] final hidden states after the final norm; bf16 travels as uint16
    ids: np.ndarray | None = None  # int32 [C, K]
    logprobs: np.ndarray | None = None  # float32 [C, K], over the whole vocabulary, nats
    tail: np.ndarray | None = None  # float32 [C], log of the mass outside `ids`


class TrainItem(NamedTuple):
    """One sequence that the learner trains on, as the driver sees it.

    `sample` and `targets` are None for a demonstration, which the learner reads from the ProblemSet.
    """

    key: SampleKey
    num_prompt_tokens: int
    num_completion_tokens: int
    teacher_version: int  # -1 for a demonstration
    finish_reason: FinishReason = "stop"
    policy_version: int = -1  # the oldest that sampled a token of it; -1 for a demonstration
    sample: Piece | None = None  # the Sample
    targets: Piece | None = None  # the TeacherTargets

    @property
    def num_tokens(self) -> int:
        """Tokens that the learner processes for this item."""
        return self.num_prompt_tokens + self.num_completion_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """What a generator has finished since it was last asked."""

    samples: list[SampleRef]
    span: Span


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A teacher's answer."""

    items: list[TrainItem]
    span: Span


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFile:
    """One file of a checkpoint, as it was written."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """One message of a weight push: tensors laid one behind the other in one byte buffer."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]  # "float32", "bfloat16"
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightManifest:
    """What a weight push consists of, in order."""

    version: int
    buckets: tuple[Bucket, ...]
    adapter_scale: float = 0.0  # alpha / r, where there are adapters among them
