"""Teacher: a Ray actor's class that reads prompt + demonstration + completion and returns what it
believes at each completion position, as final hidden states.

Consumes references to Samples; produces TeacherTargets, of which the driver opens the metadata only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.choose import choose
from actors.engine import Engine
from sdft_dist.config import Config
from sdft_dist.errors import UserError
from sdft_dist.logits import logit_transform
from sdft_dist.pieces import fetch, split, train_items
from sdft_dist.types import Sample, SampleRef, Scored, Span, TeacherTargets, WeightManifest


class Teacher:
    """One vLLM pooling engine with the teacher's weights."""

    def __init__(self, config: Config, device: str, vocab_size: int, problems: Any):
        self.config, self.problems = config, problems
        self._refused: UserError | None = None
        try:
            self.engine = Engine(config, "pooling", device, stop_ids=(), vocab_size=None)
        except UserError as e:  # for `ready`: of what a constructor raises Ray passes on the text alone
            self._refused = e
        self.vocab_size = vocab_size

    def ready(self) -> bool:
        """Returns when the engine stands. Raises UserError where it cannot."""
        if self._refused is not None:
            raise self._refused
        return True

    def score(self, refs: Sequence[SampleRef], lists: int = 1) -> tuple[Any, ...]:
        """Read each sample under the teacher's prompt. Returns a Scored, and the TeacherTargets in as many lists."""
        started = time.time()
        samples: list[Sample] = fetch([r.sample for r in refs])
        prompts = [self.problems[s.key.problem].teacher_prompt_ids for s in samples]
        sequences = [np.concatenate([p, s.completion_ids]) for p, s in zip(prompts, samples, strict=True)]
        # By step, so that a resumed run finds in the cache what an uninterrupted one does.
        states = self.engine.states(sequences, [len(p) for p in prompts], [str(s.key.step) for s in samples])
        version = self.engine.version
        assert version is not None
        dtype = self.config.model.dtype
        targets = [
            TeacherTargets(key=s.key, teacher_version=version, dtype=dtype, **self._beliefs(s, rows))
            for s, rows in zip(samples, states, strict=True)
        ]
        places, parts = split(targets, lists)
        items = train_items(refs, places, version)
        return Scored(items=items, span=Span("score", started, time.time())), *parts

    def _beliefs(self, sample: Sample, states: np.ndarray) -> dict[str, np.ndarray]:
        """The fields of TeacherTargets that `loss.support` asks for, from the states [C, D]."""
        loss = self.config.loss
        if loss.support == "full":
            return {"states": states}
        if loss.support == "sampled":
            ids: np.ndarray | int = sample.completion_ids[:, None]
        elif loss.topk_from == "student":
            assert sample.top_ids is not None
            ids = sample.top_ids
        else:
            ids = loss.top_k
        head = self.engine.pushed_head()[: self.vocab_size]
        transform = logit_transform(self.engine.settings)
        found = choose(states, head, ids, transform, self.config.rollout.temperature)
        return dict(zip(("ids", "logprobs", "tail"), found, strict=True))

    def forget(self) -> None:
        """Nothing is under way between two calls."""

    def sleep(self) -> None:
        """Give up the GPU's memory."""
        self.engine.sleep()

    def wake_up(self) -> None:
        """Take the GPU's memory back."""
        self.engine.wake_up()

    def peak_gib(self) -> float:
        """Peak memory of this actor."""
        return self.engine.peak_gib()

    def join_push(self, init_info: dict[str, Any]) -> None:
        """Join the push group."""
        self.engine.join_push(init_info)

    def receive(self, manifest: WeightManifest) -> tuple[Span, ...]:
        """Take in one whole push."""
        return self.engine.receive(manifest)
