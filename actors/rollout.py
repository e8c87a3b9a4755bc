"""Generator: a Ray actor's class that samples student completions from the plain prompt.

Consumes sample keys; produces Samples, of which the driver opens the metadata only.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.engine import Completion, Engine, Sampling
from sdft_dist.config import Config
from sdft_dist.errors import UserError
from sdft_dist.pieces import sample_refs
from sdft_dist.types import Rollout, Sample, SampleKey, Span, WeightManifest


def sample_seed(run_seed: int, key: SampleKey) -> int:
    """Seed of one rollout, from (run seed, step, problem, sample): the same whichever actor samples it."""
    digest = hashlib.blake2b(f"{run_seed}/{key.step}/{key.problem}/{key.sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Generator:
    """One vLLM engine with the student's weights, which samples of the first `vocab_size` ids where that is given.
    Without `problems` it serves the weights of the model's folder, and needs no push."""

    def __init__(
        self, config: Config, device: str, stop_ids: Sequence[int], problems: Any, vocab_size: int | None = None
    ):
        self.config, self.problems = config, problems
        self._refused: UserError | None = None
        try:
            self.engine = Engine(config, "generate", device, stop_ids, vocab_size)
            if problems is None:
                self.engine.version = 0
        except UserError as e:  # for `ready`: of what a constructor raises Ray passes on the text alone
            self._refused = e
        self._keys: dict[str, SampleKey] = {}  # of the engine's requests that are samples
        self._finished: dict[str, Completion] = {}

    def ready(self) -> bool:
        """Returns when the engine stands. Raises UserError where it cannot."""
        if self._refused is not None:
            raise self._refused
        return True

    def rollout(
        self, keys: Sequence[SampleKey], slice_s: float | None, max_tokens: int | None = None
    ) -> tuple[Rollout, list[Sample]]:
        """Take on `keys`, decode for `slice_s` seconds but at least one step (None: until everything is
        finished), and return what is finished. Between two calls the engine may be given new weights. A completion is
        cut at `max_tokens`, without it at the recipe's `rollout.max_completion_tokens`."""
        started = time.time()
        problems = [self.problems[key.problem] for key in keys]
        rollout, loss = self.config.rollout, self.config.loss
        how = Sampling(
            max_tokens or rollout.max_completion_tokens,
            rollout.temperature,
            rollout.top_p,
            rollout.top_k,
            loss.top_k if loss.support == "topk" and loss.topk_from == "student" else 0,
        )
        prompts = [p.teacher_prompt_ids if rollout.from_teacher else p.prompt_ids for p in problems]
        names = self.engine.add(prompts, [sample_seed(self.config.seed, key) for key in keys], how)
        self._keys |= zip(names, keys, strict=True)
        while self.engine.unfinished:
            self._finished |= self.engine.advance()
            if slice_s is not None and time.time() >= started + slice_s:
                break
        done = [(self._keys.pop(name), self._finished.pop(name)) for name in [*self._keys] if name in self._finished]
        samples = [Sample(key=key, **completion._asdict()) for key, completion in done]
        span = Span("decode", started, time.time(), self.engine.decode_batch())
        answer = Rollout(samples=sample_refs(samples, self.problems), span=span)
        return answer, samples

    def sample(self, problems: Sequence[int]) -> list[Sample]:
        """One completion for each problem index, as the records themselves; for checks, not for training."""
        return self.rollout([SampleKey(0, i, 0) for i in problems], None)[1]

    def complete(
        self, prompts: Sequence[np.ndarray], max_tokens: int, seeds: Sequence[int] | None = None
    ) -> list[np.ndarray]:
        """Completions (int32 [C] each) of `prompts`, for evaluation: greedy, or with a seed for each sampled as
        rollouts are. Rollouts go on meanwhile."""
        rollout = self.config.rollout
        how = Sampling(max_tokens, 0.0)
        if seeds is not None:
            how = Sampling(max_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
        names = self.engine.add(prompts, seeds or [0] * len(prompts), how)
        while not all(name in self._finished for name in names):
            self._finished |= self.engine.advance()
        return [self._finished.pop(name).completion_ids for name in names]

    def loglikelihoods(self, sequences: Sequence[np.ndarray], starts: Sequence[int]) -> list[tuple[float, bool]]:
        """Log-probability of each sequence's tokens from `start` on, and whether greedy decoding gives them."""
        return self.engine.loglikelihoods(sequences, starts)

    def forget(self) -> None:
        """Drop all samples that are under way."""
        self.engine.abort()
        self._keys, self._finished = {}, {}

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
