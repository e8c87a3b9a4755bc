"""Generator: a Ray actor's class that samples student completions from the plain prompt.

Consumes sample keys; produces Samples, put into the object store here, so that the driver sees
references and metadata only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.engine import Engine, Sampling
from sdft_dist.config import Config
from sdft_dist.types import Sample, SampleKey, SampleRef, WeightManifest


def sample_seed(run_seed: int, key: SampleKey) -> int:
    """Seed of one rollout, from (run seed, step, problem, sample): the same whichever actor samples it."""
    digest = hashlib.blake2b(f"{run_seed}/{key.step}/{key.problem}/{key.sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Generator:
    """One vLLM engine with the student's weights."""

    def __init__(self, config: Config, device: str, stop_ids: Sequence[int], problems: Any):
        self.config, self.problems = config, problems
        self.engine = Engine(config, "generate", device, stop_ids)

    def ready(self) -> bool:
        """Returns when the engine stands."""
        return True

    def generate(self, keys: Sequence[SampleKey]) -> list[SampleRef]:
        """Sample a completion for each key."""
        import ray

        rollout, loss = self.config.rollout, self.config.loss
        how = Sampling(
            rollout.max_completion_tokens,
            rollout.temperature,
            rollout.top_p,
            rollout.top_k,
            loss.top_k if loss.support == "topk" and loss.topk_from == "student" else 0,
        )
        problems = [self.problems[key.problem] for key in keys]
        prompts = [p.teacher_prompt_ids if rollout.from_teacher else p.prompt_ids for p in problems]
        completions = self.engine.generate(prompts, [sample_seed(self.config.seed, key) for key in keys], how)
        refs = []
        for key, problem, done in zip(keys, problems, completions, strict=True):
            sample = Sample(
                key=key,
                completion_ids=done.token_ids,
                logprobs=done.logprobs,
                finish_reason=done.finish_reason,
                policy_versions=done.versions,
                top_ids=done.top_ids,
            )
            refs.append(
                SampleRef(
                    key=key,
                    num_prompt_tokens=len(problem.prompt_ids),
                    num_completion_tokens=len(done.token_ids),
                    finish_reason=done.finish_reason,
                    policy_versions=done.versions,
                    ref=ray.put(sample),
                )
            )
        return refs

    def sample(self, problems: Sequence[int]) -> list[Sample]:
        """One completion for each problem index, as the records themselves; for checks, not for training."""
        import ray

        return list(ray.get([r.ref for r in self.generate([SampleKey(0, i, 0) for i in problems])]))

    def complete(self, prompts: Sequence[np.ndarray], max_tokens: int) -> list[np.ndarray]:
        """Greedy completions (int32 [C] each) of `prompts`, for evaluation."""
        return [done.token_ids for done in self.engine.generate(prompts, [0] * len(prompts), Sampling(max_tokens, 0.0))]

    def join_push(self, init_info: dict[str, Any]) -> None:
        """Join the push group."""
        self.engine.join_push(init_info)

    def receive(self, manifest: WeightManifest) -> None:
        """Take in one whole push."""
        self.engine.receive(manifest)
