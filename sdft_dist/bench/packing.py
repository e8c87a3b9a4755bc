"""Packed against padded micro-batches: `python -m sdft_dist.bench.packing RECIPE [section.field=value ...]`.

Takes the lengths of the recipe's own rows (prompt and demonstration). Printed are the share of slots that
train nothing (free slots, and waiting for the fullest rank), and trained tokens per second, forward and
backward, packed and padded to the longest of a micro-batch, taking turns; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from learner.fused import Objective
from learner.microbatch import Layout, TrainSequence, build
from learner.model import MicroBatch, Student, load_causal_lm
from sdft_dist.batching import one_after_another, pack, rows
from sdft_dist.config import Config
from sdft_dist.inputs import read_inputs
from sdft_dist.problems import batch
from sdft_dist.recipe import load_config


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_intermixed_args()
    config = load_config(args.recipe, [*args.overrides, "method=sft"])
    inputs = read_inputs(config)
    problems = inputs.problems
    size = config.rollout.prompts_per_step
    steps = [
        [
            TrainSequence(prompt_ids=problems[i].prompt_ids, completion_ids=problems[i].demonstration_ids)
            for i in batch(step, num_problems=len(problems), size=size, seed=config.seed)
        ]
        for step in range(args.steps)
    ]
    lm = load_causal_lm(config.model)
    width = lm.config.get_text_config().hidden_size
    print(f"{args.steps} steps of {size} rows, {config.learner.tokens_per_microbatch} tokens per micro-batch")
    print("ranks  free or waiting: one row (FlashAttention)  balanced rows (sdpa)  padded to the longest")
    for ranks in (1, 2, 8):
        shares = np.mean([_shares(config, step, ranks, width) for step in steps], axis=0)
        print(f"{ranks:5}  {100 * shares[0]:41.1f}%  {100 * shares[1]:19.1f}%  {100 * shares[2]:20.1f}%")
    student = Student(lm, inputs.vocab_size, Objective(kind="cross_entropy"))
    layouts: dict[str, Layout] = {"packed": partial(rows, width=width), "padded": padded}
    rates: dict[str, list[float]] = {name: [] for name in layouts}
    for step in steps[: args.pairs + 1]:
        (plan,) = pack(_lengths(step), num_ranks=1, budget=config.learner.tokens_per_microbatch)
        for name, layout in layouts.items():
            started = time.perf_counter()
            for part in plan:
                student(_build([step[i] for i in part], layout)).total.backward()
            rates[name].append(sum(_lengths(step)) / (time.perf_counter() - started))
    faster = [p / q for p, q in zip(rates["packed"][1:], rates["padded"][1:], strict=True)]
    medians = [statistics.median(rates[name][1:]) for name in layouts]
    print(f"tokens/s, forward and backward: packed {medians[0]:.0f}, padded {medians[1]:.0f}; "
          f"packed / padded {statistics.median(faster):.2f} ({min(faster):.2f} – {max(faster):.2f})")  # fmt: skip


def _lengths(sequences: Sequence[TrainSequence]) -> list[int]:
    return [len(s.prompt_ids) + len(s.completion_ids) for s in sequences]


def _shares(config: Config, step: Sequence[TrainSequence], ranks: int, width: int) -> list[float]:
    """Share of slots without a token, by layout, when all ranks wait for the fullest one."""
    lengths = _lengths(step)
    plan = pack(lengths, num_ranks=ranks, budget=config.learner.tokens_per_microbatch)

    def slots(part: list[int], layout: Layout) -> int:
        own = [lengths[i] for i in part]
        found = layout(own)
        return len(found) * max((sum(own[i] for i in row) for row in found), default=0)

    found = []
    for layout in (one_after_another, partial(rows, width=width), padded):
        fullest = max(sum(slots(part, layout) for part in mine) for mine in plan)
        found.append(1 - sum(lengths) / (ranks * fullest))
    return found


def padded(lengths: Sequence[int]) -> list[list[int]]:
    """A row for each sequence."""
    return [[i] for i in range(len(lengths))]


def _build(part: Sequence[TrainSequence], layout: Layout) -> MicroBatch:
    weights = [1.0 / len(part)] * len(part)
    return build(part, weights, 0, teacher_heads=None, layout=layout, device=torch.device("cpu"))


if __name__ == "__main__":
    main()
