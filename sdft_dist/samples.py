"""A few of a run's samples as text, for people to read: what was asked, shown, and sampled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdft_dist.config import Config
from sdft_dist.files import write_jsonl
from sdft_dist.inputs import Inputs
from sdft_dist.pieces import fetch
from sdft_dist.types import Sample, TrainItem

NUMBER = 8  # of a step
TIMEOUT_S = 20.0  # for them to come from other nodes; nobody waits longer for what is only read


def is_due(config: Config, step: int) -> bool:
    """After the first step, and after those that are evaluated, or saved where nothing is evaluated."""
    every = config.eval.every or config.checkpoint.every
    return step == 1 or (every > 0 and step % every == 0)


def write_samples(path: Path, inputs: Inputs, items: Sequence[TrainItem]) -> None:
    """A line of JSON for each of `items` that was sampled, with its row's place, prompt, demonstration and completion;
    the completion with its special tokens. Writes nothing where the samples went with their node."""
    from ray.exceptions import RayError

    try:
        samples: list[Sample] = fetch([item.sample for item in items if item.sample is not None], TIMEOUT_S)
    except RayError:
        return
    if samples:
        write_jsonl(path, (_readable(sample, inputs) for sample in samples))


def _readable(sample: Sample, inputs: Inputs) -> dict[str, Any]:
    problem, decode = inputs.problems[sample.key.problem], inputs.tokenizer.decode
    return {
        "row": inputs.kept[sample.key.problem].where,
        "prompt": decode(problem.prompt_ids, skip_special_tokens=True),
        "demonstration": decode(problem.demonstration_ids, skip_special_tokens=True),
        "completion": decode(sample.completion_ids),
        "finish_reason": sample.finish_reason,
        "policy_versions": [span.version for span in sample.policy_versions],
        "logprob_per_token": float(sample.logprobs.mean()) if len(sample.logprobs) else None,
    }
