"""Teacher: a Ray actor's class that reads prompt + demonstration + completion and returns what it
believes at each completion position, as final hidden states.

Consumes references to Samples; produces TeacherTargets, put into the object store here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.engine import Engine
from sdft_dist.config import Config
from sdft_dist.types import Sample, SampleRef, TeacherTargets, TrainItem, WeightManifest


class Teacher:
    """One vLLM pooling engine with the teacher's weights."""

    def __init__(self, config: Config, device: str, problems: Any):
        self.config, self.problems = config, problems
        self.engine = Engine(config, "pooling", device, stop_ids=())
        if config.teacher.kind == "base":
            self.engine.use_initial_weights()

    def ready(self) -> bool:
        """Returns when the engine stands."""
        return True

    def score(self, refs: Sequence[SampleRef]) -> list[TrainItem]:
        """Read each sample under the teacher's prompt; the item refers to the targets."""
        import ray

        samples: list[Sample] = ray.get([r.ref for r in refs])
        prompts = [self.problems[s.key.problem].teacher_prompt_ids for s in samples]
        sequences = [np.concatenate([p, s.completion_ids]) for p, s in zip(prompts, samples, strict=True)]
        states = self.engine.states(sequences, [len(p) for p in prompts])
        version = self.engine.version
        assert version is not None
        items = []
        for r, rows in zip(refs, states, strict=True):
            targets = TeacherTargets(key=r.key, teacher_version=version, states=rows, dtype=self.config.model.dtype)
            items.append(
                TrainItem(
                    key=r.key,
                    num_prompt_tokens=r.num_prompt_tokens,
                    num_completion_tokens=r.num_completion_tokens,
                    teacher_version=version,
                    sample=r.ref,
                    targets=ray.put(targets),
                )
            )
        return items

    def join_push(self, init_info: dict[str, Any]) -> None:
        """Join the push group."""
        self.engine.join_push(init_info)

    def receive(self, manifest: WeightManifest) -> None:
        """Take in one whole push."""
        self.engine.receive(manifest)
