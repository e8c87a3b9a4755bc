"""`sdft bench --learner-only | --generator-only | --teacher-only`: one role by itself.

Nothing else works meanwhile: the learner trains on made-up targets of the right shape, the teacher reads the
demonstrations as if they had been sampled. Engines get their weights from a learner that then stands idle.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from sdft_dist import pieces
from sdft_dist.bench.account import Machine, accounts, mean_lengths, processed
from sdft_dist.bench.contestants import Ours, contestant, machine, spans
from sdft_dist.bench.figures import spread, summary
from sdft_dist.cluster import launch
from sdft_dist.config import Config
from sdft_dist.errors import UserError
from sdft_dist.fleet import Fleet
from sdft_dist.loop import batch_keys, demonstrations
from sdft_dist.planning.dimensions import read_dimensions
from sdft_dist.problems import ProblemSet
from sdft_dist.session import ray_session
from sdft_dist.topology import sizes
from sdft_dist.types import Sample, SampleKey, SampleRef, TeacherTargets, TrainItem, VersionSpan

WARM = 2  # batches that are not counted
# Does the work of one optimizer step; returns its completion tokens, and of generators the decode batch.
Batch = Callable[[int], tuple[int, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one role is given to do: batches of `batch` prompts of the problems `rows`, and completions of at most
    `max_tokens`."""

    role: str
    batch: int
    rows: range
    max_tokens: int

    def keys(self, config: Config, step: int) -> list[SampleKey]:
        """The samples of batch `step`, as a run on those rows alone draws them."""
        drawn = batch_keys(config.changed(rollout={"prompts_per_step": self.batch}), self.rows, step)
        return [key._replace(problem=self.rows[key.problem]) for key in drawn]


def bench_role(config: Config, out: Path, role: str, *, repeats: int, fixed: bool) -> dict[str, Any]:
    """Measure `repeats` batches of `role` and return the report, which is also written to `out/bench.json`.

    `fixed` gives every completion `rollout.max_completion_tokens`. Raises UserError as a run would, and for the
    role of an engine that `method` does not have.
    """
    if config.method != "sdft" and role != "learner":
        raise UserError(f"--{role}-only: method={config.method} has no {role}")
    out.mkdir(parents=True, exist_ok=True)
    ours, rollout = contestant(config, config.method, out, fixed=fixed), config.rollout
    load = Load(
        role=role,
        batch=rollout.prompts_per_step,
        rows=range(len(ours.inputs.problems)),
        max_tokens=rollout.max_completion_tokens,
    )
    start = launch(ours.config, ours.inputs, engines=(role,))
    with ray_session(config), start as fleet:
        (report,) = bench_loads(ours, fleet, [load], repeats)
    (out / "bench.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def bench_loads(ours: Ours, fleet: Fleet, loads: Sequence[Load], repeats: int) -> Iterator[dict[str, Any]]:
    """`repeats` batches of each of `loads`, one load after the other; a report of each when it is done."""
    used = None
    for load in loads:
        found = _work_on(ours, fleet, load, repeats)
        used = machine(fleet) if used is None else replace(used, peak_gib=fleet.peak_gib())
        yield _report(ours.config, ours.inputs.problems, load, used, *found)


def _work_on(ours: Ours, fleet: Fleet, load: Load, repeats: int) -> tuple[list[float], list[tuple[int, float]]]:
    """Seconds of each batch that counts, and what it came to."""
    work = {"generator": _generating, "teacher": _scoring, "learner": _learning}[load.role](ours, fleet, load)
    taken, done = [], []
    for step in range(WARM + repeats):
        if load.role == "generator":
            fleet.version += 1  # so that no prompt's keys and values are there already
            fleet.learner.push(fleet.generators, fleet.version, fleet.version, wait=True)
        started = time.perf_counter()
        done.append(work(step))
        taken.append(time.perf_counter() - started)
    return taken[WARM:], done[WARM:]


def _report(
    config: Config,
    problems: ProblemSet,
    load: Load,
    used: Machine,
    taken: list[float],
    done: list[tuple[int, float]],
) -> dict[str, Any]:
    cluster, batch = config.cluster, len(load.keys(config, 0))
    tokens, decoding = zip(*done, strict=True)
    actors = sizes(config)[load.role].actors
    lengths = mean_lengths([problems[i] for i in load.rows], statistics.mean(tokens) / batch)
    name = load.role if config.method == "sdft" else "sft"
    device_s = {name: actors * spans(config)[load.role] * statistics.median(taken) / batch}
    decode_batch = min(batch / cluster.generators, cluster.max_sequences)
    (account,) = accounts(config, lengths, used, device_s, decode_batch).values()
    return {
        "role": load.role,
        "method": config.method,
        "batch": batch,
        "repeats": len(taken),
        "actors": actors,
        "device": used.device,
        "lengths": asdict(lengths),
        "batch_s": summary(taken),
        "tokens_per_s": summary([batch * processed(lengths)[load.role] / seconds for seconds in taken]),
        **({"decode_batch": {"measured": statistics.mean(decoding), "planned": decode_batch}} if any(decoding) else {}),
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
        f"MFU {100 * account['mfu']:.1f}%; peak memory {account['peak_gib']:.2f} GiB"
        + (f", predicted {account['predicted_gib']:.2f}" if "predicted_gib" in account else "")
        + (f"; decode batch {report['decode_batch']['measured']:.1f}" if "decode_batch" in report else ""),
        highlight=False,
    )


def _generating(ours: Ours, fleet: Fleet, load: Load) -> Batch:
    import ray

    generators = fleet.generators.actors

    def batch(step: int) -> tuple[int, float]:
        keys, n = load.keys(ours.config, step), len(generators)
        calls = [(actor.rollout.options(num_returns=2), keys[i::n]) for i, actor in enumerate(generators)]
        done = ray.get([rollout.remote(mine, None, load.max_tokens)[0] for rollout, mine in calls])
        tokens = sum(sample.num_completion_tokens for rollout in done for sample in rollout.samples)
        return tokens, statistics.mean(rollout.span.batch for rollout in done)

    return batch


def _scoring(ours: Ours, fleet: Fleet, load: Load) -> Batch:
    import ray

    fleet.to_teachers(0)
    teachers = fleet.teachers.actors

    def batch(step: int) -> tuple[int, float]:
        refs, n = as_sampled(ours.config, ours.inputs.problems, load.keys(ours.config, step)), len(teachers)
        ray.get([actor.score.options(num_returns=2).remote(refs[i::n])[0] for i, actor in enumerate(teachers)])
        return sum(ref.num_completion_tokens for ref in refs), 0.0

    return batch


def _learning(ours: Ours, fleet: Fleet, load: Load) -> Batch:
    """Every step on the items of the first, which stay in the object store."""
    config, problems = ours.config, ours.inputs.problems
    keys = load.keys(config, 0)
    if config.method == "sdft":
        fleet.learner.push(fleet.teachers, 0, 0)  # to nobody: the ranks keep the head that the targets go through
        items = _as_scored(ours, as_sampled(config, problems, keys))
    else:
        items = demonstrations(problems, keys)

    def batch(step: int) -> tuple[int, float]:
        fleet.learner.update(step, config.num_steps(len(problems)), items)
        return sum(item.num_completion_tokens for item in items), 0.0

    return batch


def as_sampled(config: Config, problems: ProblemSet, keys: Sequence[SampleKey]) -> list[SampleRef]:
    """The demonstrations of `keys` as if the student had sampled them; several of one prompt differ from the start."""
    import ray

    loss = config.loss
    samples = []
    for key in keys:
        ids = np.roll(problems[key.problem].demonstration_ids, key.sample)
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
    return pieces.bound(pieces.sample_refs(samples, problems), [ray.put(samples)])


def _as_scored(ours: Ours, refs: Sequence[SampleRef]) -> list[TrainItem]:
    """Items with random targets of the shape that `loss.support` asks for."""
    import ray

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
    places, lists = pieces.split(targets, 1 + len(targets) // 8)
    return pieces.bound(pieces.train_items(refs, places, 0), [ray.put(own) for own in lists])
