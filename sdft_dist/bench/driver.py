"""What the driver itself costs: `python -m sdft_dist.bench.driver`.

The real loop, stream, log and Ray, with generators and teachers that answer at once and a learner that
does nothing: the whole step is then the driver and Ray's messages. Printed are, per step, the wall time,
the processor time of the driver's process with the threads in which Ray moves messages, and that of the
driver's own thread; then its memory over many steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
from rich.console import Console

from sdft_dist.cluster import stream
from sdft_dist.config import Config
from sdft_dist.loop import train
from sdft_dist.pieces import split, train_items
from sdft_dist.problems import ProblemSet
from sdft_dist.recipe import parse
from sdft_dist.remote import Events
from sdft_dist.runlog import RunLog
from sdft_dist.session import ray_session
from sdft_dist.types import Piece, Problem, Rollout, SampleKey, SampleRef, Scored, Span, TrainItem, VersionSpan


class Generator:
    """Answers with one sample for each key, of no content."""

    def rollout(self, keys: Sequence[SampleKey], slice_s: float | None) -> tuple[Rollout, list[Any]]:
        now = time.time()
        samples = [
            SampleRef(
                key=key,
                num_prompt_tokens=300,
                num_completion_tokens=400,
                finish_reason="stop",
                policy_versions=(VersionSpan(key.step, 0, 400),),
                sample=Piece(0, row),
            )
            for row, key in enumerate(keys)
        ]
        return Rollout(samples=samples, span=Span("decode", now, time.time())), []


class Teacher:
    """Answers with one item for each sample."""

    def score(self, samples: Sequence[SampleRef], lists: int) -> tuple[Any, ...]:
        now = time.time()
        places, parts = split(samples, lists)
        return Scored(items=train_items(samples, places, 0), span=Span("score", now, time.time())), *([] for _ in parts)


class Nothing:
    """A learner and a push that take no time."""

    def update(self, step: int, num_steps: int, items: Sequence[TrainItem]) -> dict[str, Any]:
        return {"loss": 1.0, "grad_norm": 1.0, "divergence_per_token": 0.1}

    def to_generators(self, version: int) -> None: ...
    def to_teachers(self, version: int) -> None: ...


def measure(config: Config, steps: int) -> tuple[list[list[float]], list[int]]:
    """Wall, process and thread seconds of each step, and resident bytes after each."""
    import ray

    ids = np.arange(1, 5)
    problems = ProblemSet([Problem(prompt_ids=ids, teacher_prompt_ids=ids, demonstration_ids=ids)] * 4096)
    actors = [ray.remote(cls).options(num_cpus=0).remote() for cls in (Generator, Teacher)]
    clocks = (time.perf_counter, time.process_time, time.thread_time)
    times: list[list[float]] = [[clock()] for clock in clocks]
    memory: list[int] = []
    process = psutil.Process()

    def after_step(step: int) -> None:
        memory.append(process.memory_info().rss)
        for clock, ends in zip(clocks, times, strict=True):
            ends.append(clock())

    with tempfile.TemporaryDirectory() as folder, RunLog(Path(folder), title="", console=Console(quiet=True)) as log:
        generators, teachers = (SimpleNamespace(actors=[actor], lost={}) for actor in actors)
        path = stream(config, generators, teachers, Events(), log.span)
        config = config.changed(steps=steps)
        train(config, problems, path, Nothing(), Nothing(), log, after_step=after_step)
    for actor in actors:
        ray.kill(actor)
    return [np.diff(ends)[2:].tolist() for ends in times], memory  # without the first two steps


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[32, 128, 512, 2048])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--memory-steps", type=int, default=2000)
    args = parser.parse_args()
    tree = {"model": {"path": "none"}, "data": {"train": "none"}, "loss": {"support": "sampled"}}
    with ray_session(parse(Config, tree)):
        print(f"{'samples':>8} {'wall ms':>9} {'process ms':>11} {'own thread ms':>14}   medians of {args.steps} steps")
        for n in args.samples:
            config = parse(Config, {**tree, "rollout": {"prompts_per_step": n}})
            wall, process, thread = (1e3 * statistics.median(t) for t in measure(config, args.steps)[0])
            print(f"{n:8} {wall:9.1f} {process:11.1f} {thread:14.1f}", flush=True)
        _, memory = measure(parse(Config, {**tree, "rollout": {"prompts_per_step": 32}}), args.memory_steps)
        tenth = args.memory_steps // 10
        print(f"driver's memory: {memory[tenth] / 2**20:.1f} MiB after {tenth} steps, "
              f"{memory[-1] / 2**20:.1f} MiB after {args.memory_steps}")  # fmt: skip


if __name__ == "__main__":
    main()
