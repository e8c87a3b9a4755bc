"""`sdft bench --learner-only | --generator-only | --teacher-only`: one role by itself.

Nothing else works meanwhile: the learner trains on made-up targets of the right shape, the teacher reads the
demonstrations as if they had been sampled. Engines get their weights from a learner that then stands idle.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from sdft_dist import pieces
from sdft_dist.account import accounts, mean_lengths
from sdft_dist.bench import Ours, contestant, machine, new_folder, spread, summary
from sdft_dist.cluster import Fleet, launch, ray_session
from sdft_dist.config import Config
from sdft_dist.data import ProblemSet
from sdft_dist.dimensions import read_dimensions
from sdft_dist.errors import UserError
from sdft_dist.loop import batch_keys, demonstrations
from sdft_dist.types import Sample, SampleKey, SampleRef, TeacherTargets, TrainItem, VersionSpan

WARM = 2  # batches that are not counted
ENGINES = {"generator": ("generator",), "teacher": ("teacher",), "learner": ()}
Batch = Callable[[int], int]  # does the work of one optimizer step; returns its completion tokens


def bench_role(config: Config, out: Path, role: str, *, repeats: int, fixed: bool) -> dict[str, Any]:
    """Measure `repeats` batches of `role` and return the report, which is also written to `out/bench.json`.

    `fixed` gives every completion `rollout.max_completion_tokens`. Raises UserError as a run would, and for the
    role of an engine that `method` does not have.
    """
    if config.method != "sdft" and role != "learner":
        raise UserError(f"--{role}-only: method={config.method} has no {role}")
    (report,) = bench_batches(config, out, role, [config.rollout.prompts_per_step], repeats=repeats, fixed=fixed)
    return report


def bench_batches(
    config: Config, out: Path, role: str, batches: Sequence[int], *, repeats: int, fixed: bool
) -> list[dict[str, Any]]:
    """The same for several values of `rollout.prompts_per_step` with one start; a report for each, `bench.json`
    is of the last."""
    new_folder(out)
    ours = contestant(config, config.method, out, fixed=fixed)
    start = launch(ours.config, ours.problems, ours.vocab_size, ours.stop_ids, engines=ENGINES[role])
    with ray_session(config), start as fleet:
        reports = [_measure(_with_batch(ours, batch), fleet, role, repeats) for batch in batches]
    (out / "bench.json").write_text(json.dumps(reports[-1], indent=2) + "\n")
    return reports


def _with_batch(ours: Ours, batch: int) -> Ours:
    rollout = ours.config.rollout.model_copy(update={"prompts_per_step": batch})
    return replace(ours, config=ours.config.model_copy(update={"rollout": rollout}))


def _measure(ours: Ours, fleet: Fleet, role: str, repeats: int) -> dict[str, Any]:
    config = ours.config
    work = {"generator": _generating, "teacher": _scoring, "learner": _learning}[role](ours, fleet)
    taken, tokens = [], []
    for step in range(WARM + repeats):
        started = time.perf_counter()
        tokens.append(work(step))
        taken.append(time.perf_counter() - started)
    used = machine(fleet)
    cluster, batch = config.cluster, len(batch_keys(config, ours.problems, 0))
    actors = {"generator": cluster.generators, "teacher": cluster.teachers, "learner": config.learner.ranks}[role]
    lengths = mean_lengths(ours.problems, statistics.mean(tokens[WARM:]) / batch)
    processed = (
        lengths.completion
        + {
            "generator": 0,
            "teacher": lengths.prompt + lengths.demonstration,
            "learner": lengths.prompt,
        }[role]
    )
    name = role if config.method == "sdft" else "sft"
    device_s = {name: actors * statistics.median(taken[WARM:]) / batch}
    (account,) = accounts(config, lengths, used, device_s, batch / cluster.generators).values()
    return {
        "role": role,
        "method": config.method,
        "batch": batch,
        "repeats": repeats,
        "actors": actors,
        "device": used.device,
        "lengths": asdict(lengths),
        "batch_s": summary(taken[WARM:]),
        "tokens_per_s": summary([batch * processed / seconds for seconds in taken[WARM:]]),
        "account": account,
    }


def show(report: dict[str, Any], console: Console) -> None:
    """The report in a few lines."""
    n, account = report["lengths"], report["account"]
    console.print(
        f"{report['role']} alone, method={report['method']}, {report['actors']} on {report['device']}: "
        f"{report['repeats']} batches of {report['batch']} with {n['prompt']}/{n['demonstration']}/{n['completion']} "
        "tokens of prompt/demonstration/completion\n"
        f"seconds a batch: {spread(report['batch_s'], 3)}\n"
        f"tokens/s: {spread(report['tokens_per_s'], 0)}\n"
        f"device-seconds per sample: {account['device_s']:.5f}, predicted {account['predicted_s']:.5f}; "
        f"MFU {100 * account['mfu']:.1f}%; peak memory {account['peak_gib']:.2f} GiB",
        highlight=False,
    )


def _generating(ours: Ours, fleet: Fleet) -> Batch:
    import ray

    fleet.to_generators(0)
    generators = fleet.generators.actors

    def batch(step: int) -> int:
        keys, n = batch_keys(ours.config, ours.problems, step), len(generators)
        done = ray.get([actor.rollout.remote(keys[i::n], None) for i, actor in enumerate(generators)])
        return sum(sample.num_completion_tokens for rollout in done for sample in rollout.samples)

    return batch


def _scoring(ours: Ours, fleet: Fleet) -> Batch:
    import ray

    fleet.to_teachers(0)
    teachers = fleet.teachers.actors

    def batch(step: int) -> int:
        refs, n = as_sampled(ours.config, ours.problems, batch_keys(ours.config, ours.problems, step)), len(teachers)
        ray.get([actor.score.remote(refs[i::n]) for i, actor in enumerate(teachers)])
        return sum(ref.num_completion_tokens for ref in refs)

    return batch


def _learning(ours: Ours, fleet: Fleet) -> Batch:
    """Every step on the items of the first, which stay in the object store."""
    config, problems = ours.config, ours.problems
    keys = batch_keys(config, problems, 0)
    if config.method == "sdft":
        fleet.learner.push(fleet.teachers, 0, 0)  # to nobody: the ranks keep the head that the targets go through
        items = _as_scored(ours, as_sampled(config, problems, keys))
    else:
        items = demonstrations(problems, keys)

    def batch(step: int) -> int:
        fleet.learner.update(step, config.num_steps(len(problems)), items)
        return sum(item.num_completion_tokens for item in items)

    return batch


def as_sampled(config: Config, problems: ProblemSet, keys: Sequence[SampleKey]) -> list[SampleRef]:
    """The demonstrations of `keys` as if the student had sampled them."""
    loss = config.loss
    samples = []
    for key in keys:
        ids = problems[key.problem].demonstration_ids
        count = len(ids)
        top = np.tile(np.arange(loss.top_k, dtype=np.int32), (count, 1)) if loss.topk_from == "student" else None
        span = VersionSpan(0, 0, count)
        samples.append(
            Sample(
                key=key,
                completion_ids=ids,
                logprobs=np.zeros(count, dtype=np.float32),
                finish_reason="stop",
                policy_versions=(span,),
                top_ids=top,
            )
        )
    return [
        SampleRef(
            key=sample.key,
            num_prompt_tokens=len(problems[sample.key.problem].prompt_ids),
            num_completion_tokens=len(sample.completion_ids),
            finish_reason="stop",
            policy_versions=sample.policy_versions,
            sample=piece,
        )
        for sample, piece in zip(samples, pieces.put(samples), strict=True)
    ]


def _as_scored(ours: Ours, refs: Sequence[SampleRef]) -> list[TrainItem]:
    """Items with random targets of the shape that `loss.support` asks for."""
    loss, dtype, rng = ours.config.loss, ours.config.model.dtype, np.random.default_rng(0)
    width = read_dimensions(ours.config).width
    targets = []
    for ref in refs:
        count, kept = ref.num_completion_tokens, loss.top_k if loss.support == "topk" else 1
        beliefs: dict[str, np.ndarray] = {}
        if loss.support == "full":
            states = rng.standard_normal((count, width), dtype=np.float32)
            # The upper half of an fp32 number is the bf16 number that it is cut to.
            beliefs["states"] = states if dtype == "float32" else (states.view(np.uint32) >> 16).astype(np.uint16)
        else:
            beliefs["ids"] = np.tile(np.arange(kept, dtype=np.int32), (count, 1))
            beliefs["logprobs"] = np.full((count, kept), -np.log(2 * kept), dtype=np.float32)
            beliefs["tail"] = np.full(count, -np.log(2), dtype=np.float32)
        targets.append(TeacherTargets(key=ref.key, teacher_version=0, dtype=dtype, **beliefs))
    return [
        TrainItem(
            key=ref.key,
            num_prompt_tokens=ref.num_prompt_tokens,
            num_completion_tokens=ref.num_completion_tokens,
            teacher_version=0,
            policy_version=0,
            sample=ref.sample,
            targets=piece,
        )
        for ref, piece in zip(refs, pieces.put(targets), strict=True)
    ]
