"""What gpu_check.py measures: each check answers part by part, so that one that is cut off keeps what it has.

Heavy imports are in the checks: each runs in a process of its own.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sdft_dist.bench.roles import Load
from sdft_dist.bench.synthetic import MARGIN, parse_lengths, synthetic
from sdft_dist.config import Config
from sdft_dist.errors import UserError
from sdft_dist.recipe import load_config

RECIPE = Path(__file__).parents[2] / "deploy" / "recipes" / "paper.yaml"
LENGTHS = {"short": "300/400/400", "long": "1000/600/600"}
ROWS = 256  # of each length
REPEATS = 3
SIZES = ("qwen3-4b", "qwen3-1.7b", "qwen3-0.6b")  # of what is measured with the optimizer on the GPU
LARGE = ("qwen3-8b", *SIZES)  # and in host memory
DECODE = {"short": (64, 128, 256), "long": (128, 192)}  # requests at a time; SDFT/SFT goes by the fastest
SMALL_DECODE = {"short": (2, 4, 8), "long": (4, 6)}
LOSS = {"tokens": 8192, "width": 4096, "vocab": 128_256}
SMALL_LOSS = {"tokens": 64, "width": 4096, "vocab": 2048}
ACCOUNT = ("device_s", "predicted_s", "mfu", "peak_gib")  # of a role's account; the rest is told already
ALONE = "cluster.colocate=none"  # a learner that hands memory to no engine may take it in segments that grow
TUNED = ("learner.compile=true", "learner.gradient_checkpointing=none")  # of SFT and SDFT alike
SLOWER = {  # what the choice of TUNED and of varlen stands against
    "eager": ("learner.compile=false", "learner.gradient_checkpointing=selective"),
    "sdpa": ("model.attention=sdpa",),
}
OFFLOADED = (  # without an average, which would be in host memory too
    "learner.offload=optimizer", "learner.zero_stage=1", "learner.gradient_checkpointing=full", "teacher.kind=base",
)  # fmt: skip
# Both engines beside a learner that has next to nothing, so that the generator's keys and values find room. Weights
# with an adapter go through host memory, so that all but one go as they do without adapters.
ENGINES = (
    "model.lora.rank=1", "model.lora.targets=[0.self_attn.k_proj]", "cluster.gpu_memory_utilization=0.55",
    "cluster.teacher_memory=0.2",
)  # fmt: skip
Figures = dict[str, float]


def largest(shapes: Sequence[str], device: str, more: Sequence[str]) -> str:
    """The first of `shapes`, large to small, whose learner with the fields `more` this machine holds by the plan, or
    the last; without a GPU the first."""
    if device == "cpu" or len(shapes) == 1:
        return shapes[0]
    from sdft_dist.bench.synthetic import SHAPES
    from sdft_dist.planning.dimensions import dimensions
    from sdft_dist.planning.memory import host_gib, memory_gib
    from sdft_dist.planning.plan import USABLE

    context = max(sum(parse_lengths(length)) for length in LENGTHS.values()) + MARGIN
    config = settings({"model.path": "", "data.train": "", "model.max_length": context}, device, [ALONE, *more])
    on_gpu, on_host = USABLE * gpu_gib(), host_memory_gib()
    sizes = ((shape, dimensions(SHAPES[shape])) for shape in shapes)
    fitting = (
        shape for shape, m in sizes
        if memory_gib(config, m, 1)["learner"] <= on_gpu and host_gib(config, m, 1) <= on_host
    )  # fmt: skip
    return next(fitting, shapes[-1])


def gpu_gib() -> float:
    """Memory of this process's GPU."""
    import torch

    return float(torch.cuda.get_device_properties(0).total_memory) / 2**30


def host_memory_gib() -> float:
    """Of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def lab(out: Path, device: str) -> Iterator[Figures]:
    """The lab's word taught in bfloat16: accuracy on it and on the old skills."""
    from sdft_dist.lab.base import shipped_base
    from sdft_dist.lab.demo import lab_config, measured
    from sdft_dist.train import run

    steps = None if device == "cuda" else 2
    config = lab_config(out / "lab", shipped_base(), 0, "sdft", steps, _shared(device))
    run(config)
    found = measured(config)
    yield {"new": found.curve[-1]["new"], "old": found.old(found.curve[-1]), "samples_per_s": found.samples_per_s}


def agreement(out: Path) -> Iterator[Figures]:
    """Log-probs of sampled tokens, generator against learner, nats; and the teacher's states in the engine against a
    local model's, by token: the difference's norm over the state's."""
    import ray

    from sdft_dist.bench.contestants import contestant
    from sdft_dist.bench.roles import as_sampled
    from sdft_dist.cluster import launch
    from sdft_dist.loop import batch_keys
    from sdft_dist.preflight import logprob_differences
    from sdft_dist.problems import ProblemSet
    from sdft_dist.session import ray_session

    ours = contestant(load_config(out / "lab" / "seed-0" / "sdft.yaml"), "sdft", out / "agreement", fixed=False)
    config, problems = ours.config, ours.inputs.problems
    first = ProblemSet(problems[i] for i in range(64))
    with ray_session(config), launch(config, ours.inputs) as fleet:
        fleet.to_generators(0)
        fleet.to_teachers(0)
        logprobs = logprob_differences(fleet, first, config)
        refs = as_sampled(config, problems, batch_keys(config, problems, 0))
        yield {"log-probs mean": float(logprobs.mean()), "log-probs max": float(logprobs.max())}
        scored, targets = ray.get(fleet.teachers.actors[0].score.remote(refs))
    states = _state_differences(config, [problems[item.key.problem] for item in scored.items], targets)
    yield {"states mean": states.mean().item(), "states max": states.max().item()}


def _state_differences(config: Config, problems: Sequence[Any], targets: Sequence[Any]) -> Any:
    """fp32 [T] over all tokens of the demonstrations."""
    import numpy as np
    import torch

    from learner.model import load_causal_lm
    from sdft_dist.session import resolve_device

    device = resolve_device(config)
    # One sequence at a time needs no packing, and torch's own attention is another than the engine's.
    model = load_causal_lm(config.model.model_copy(update={"attention": "sdpa"})).eval().to(device)
    differences = []
    for problem, theirs in zip(problems, targets, strict=True):
        ids = np.concatenate([problem.teacher_prompt_ids, problem.demonstration_ids])
        with torch.no_grad():
            states = model.model(torch.from_numpy(ids.astype(np.int64))[None].to(device)).last_hidden_state[0]
        own = states[len(problem.teacher_prompt_ids) - 1 : -1].float().cpu()
        other = torch.from_numpy(theirs.states.copy())
        other = (other.view(torch.bfloat16) if theirs.dtype == "bfloat16" else other).float()
        differences.append((own - other).norm(dim=-1) / own.norm(dim=-1))
    return torch.cat(differences)


def engines(out: Path, device: str, shape: Callable[[], str]) -> Iterator[Figures]:
    """A generator and a teacher that share the learner's device, on random weights of a published shape: pushes to
    them, and whether they then hold what the learner does; each by itself."""
    import torch

    from sdft_dist.bench.contestants import contestant
    from sdft_dist.bench.roles import bench_loads
    from sdft_dist.cluster import launch
    from sdft_dist.planning.dimensions import read_dimensions
    from sdft_dist.planning.memory import memory_gib
    from sdft_dist.session import ray_session
    from sdft_dist.topology import push_transport

    config = recipe(out, device, shape(), list(ENGINES))
    # Random weights end a completion only by chance.
    ours = contestant(config, "sdft", out / "engines", fixed=False)
    ours = replace(ours, inputs=replace(ours.inputs, stop_ids=[]))
    spans: dict[str, list[float]] = {}

    def note(role: str, index: int, span: Any) -> None:
        spans.setdefault(f"push {role}: {span.what} s", []).append(span.end - span.start)

    loads = engine_loads(DECODE if device == "cuda" else SMALL_DECODE)
    start = launch(config, ours.inputs, on_span=note)
    with ray_session(config), start as fleet:
        pools = (fleet.generators, fleet.teachers)
        for version in range(4):
            for pool in pools:
                fleet.learner.open_push(pool)  # after which a push is of all weights
                started = time.perf_counter()
                fleet.learner.push(pool, version, version, wait=True)
                spans.setdefault(f"push {pool.role}: all s", []).append(time.perf_counter() - started)
            fleet.version = version
        print(f"pushed over {push_transport(config, device)}", file=sys.stderr)
        yield {name: statistics.median(taken[1:]) for name, taken in spans.items()}
        yield {f"push {pool.role}: equal by checksum": equal_after_push(fleet, pool) for pool in pools}
        if device == "cuda":
            there, own = torch.cuda.mem_get_info()[1] / 2**30, memory_gib(config, read_dimensions(config), 1)
            for role in ("generator", "teacher"):  # keys and values take what is left, by setting
                share = config.cluster.engine_memory(role) * there
                yield {
                    f"{role} predicted_gib": share,
                    f"{role} weights and work predicted_gib": own[role],
                    f"{role} keys and values predicted_gib": share - own[role],
                }
        yield from _by_load(loads, bench_loads(ours, fleet, loads, REPEATS), lambda load: f"{load.role} ")


def engine_loads(decode: Mapping[str, Sequence[int]]) -> list[Load]:
    """Of teachers and, in batches of `decode`, generators. A ratio needs one of each at both lengths: these come first,
    as a check may be cut off, generators at the largest batch, which most likely is the fastest."""
    teachers = [load("teacher", length, 64) for length in LENGTHS]
    generators = ([load("generator", length, n) for n in sorted(decode[length], reverse=True)] for length in LENGTHS)
    return teachers + [each for turn in zip_longest(*generators) for each in turn if each is not None]


def equal_after_push(fleet: Any, pool: Any) -> bool:
    """Whether a push of other weights than an engine has loaded, or was given before, leaves it with the learner's. Of
    one learner rank and one engine, each in one process."""
    import ray

    (rank,), (engine,) = fleet.learner.ranks, pool.actors
    before = ray.get(engine.__ray_call__.remote(lambda actor: actor.engine.weight_sums()))
    ours = ray.get(rank.__ray_call__.remote(_halved, pool.role))
    fleet.learner.open_push(pool)
    fleet.learner.push(pool, fleet.version, fleet.version, wait=True)
    after = ray.get(engine.__ray_call__.remote(lambda actor: actor.engine.weight_sums()))
    return bool(before != ours == after)


def _halved(rank: Any, role: str) -> tuple[int, int]:
    """The sums of those of a rank's weights that engines of the role serve, after each has been halved."""
    from sdft_dist.adapters import half_of
    from sdft_dist.wire import weight_sums

    weights = {name: weight.data for name, weight in rank.student.named_weights() if not half_of(name)}
    for weight in weights.values():
        weight.mul_(0.5)
    if role == "teachers":  # which send states
        weights.pop("lm_head.weight", None)
    return weight_sums(weights.values())


def learner(
    out: Path,
    device: str,
    shape: Callable[[], str],
    lengths: Iterable[str],
    *,
    batch: int = 32,
    method: str = "sdft",
    more: tuple[str, ...] = (),
) -> Iterator[Figures]:
    """Optimizer steps of `batch` samples by themselves, on random weights of a published shape."""
    from sdft_dist.bench.contestants import contestant
    from sdft_dist.bench.roles import bench_loads
    from sdft_dist.cluster import launch
    from sdft_dist.planning.dimensions import read_dimensions
    from sdft_dist.planning.memory import host_gib, memory_gib
    from sdft_dist.session import ray_session

    name = shape()
    folder = out / "-".join(["learner", name, method, *more])
    ours = contestant(recipe(out, device, name, [ALONE, *TUNED, *more]), method, folder, fixed=False)
    config, dimensions = ours.config, read_dimensions(ours.config)
    needed, there = host_gib(config, dimensions, 1), host_memory_gib()
    if needed > there:
        raise UserError(f"{name}: its optimizer needs {needed:.0f} GiB of host memory, {there:.0f} are there")
    yield {
        "parameters": float(dimensions.total),
        "predicted_gib": memory_gib(config, dimensions, 1)["learner"],
        "host_gib": needed,
    }
    loads = [load("learner", length, batch) for length in lengths]
    start = launch(config, ours.inputs, engines=())
    with ray_session(config), start as fleet:
        yield from _by_load(loads, bench_loads(ours, fleet, loads, REPEATS), lambda load: "")


def load(role: str, length: str, batch: int) -> Load:
    """Batches of prompts of one of LENGTHS, as they lie in `recipe`'s rows."""
    first = ROWS * list(LENGTHS).index(length)
    completion = parse_lengths(LENGTHS[length])[-1]
    return Load(role=role, batch=batch, rows=range(first, first + ROWS), max_tokens=completion)


def _by_load(
    loads: Sequence[Load], reports: Iterable[dict[str, Any]], prefix: Callable[[Load], str]
) -> Iterator[Figures]:
    """The figures of each load by role and length: tokens/s of each batch, the account of the fastest; what has no room
    for keys and values is slow."""
    best: dict[str, float] = {}
    for given, report in zip(loads, reports, strict=True):
        about, account = f"{prefix(given)}{list(LENGTHS)[given.rows.start // ROWS]} ", report["account"]
        yield {f"{about}tokens/s at {given.batch}": report["tokens_per_s"]["median"]}
        if account["device_s"] < best.get(about, math.inf):
            best[about] = account["device_s"]
            yield {f"{about}batch": given.batch, **{f"{about}{name}": account[name] for name in ACCOUNT}}


def loss(device: str, *, tokens: int, width: int, vocab: int) -> Iterator[Figures]:
    """The full-vocabulary loss, forward and backward: ours, with and without learner.compile, Liger's, and plain
    torch's, ms and GB."""
    import torch

    from learner import fused, liger
    from learner.fused import Objective, Targets

    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    states, head = make(tokens, width).requires_grad_(), (make(vocab, width) / width**0.5).requires_grad_()
    teacher_states, teacher_head = make(tokens, width), make(vocab, width) / width**0.5
    weights = torch.full((tokens,), 1 / tokens, device=device)
    labels = torch.zeros(tokens, dtype=torch.int64, device=device)
    targets = Targets(labels_T=labels, states_TD=teacher_states, heads=((tokens, teacher_head),))

    def ours(compiled: bool) -> Any:
        full = Objective(kind="full", compiled=compiled)
        return fused.weighted_loss(states, head, weights, targets, full, vocab_size=vocab).total

    def ligers() -> Any:
        plain = Objective(kind="full", liger_beta=0.0)
        return liger.weighted_loss(states, head, weights, targets, plain, vocab_size=vocab).total

    def plain() -> Any:
        logp, logq = ((s @ h.T).float().log_softmax(-1) for s, h in ((states, head), (teacher_states, teacher_head)))
        return ((logq.exp() * (logq - logp)).sum(-1) * weights).sum()

    contestants: dict[str, Callable[[], Any]] = {
        "ours": partial(ours, False),
        "compiled": partial(ours, True),
        "liger": ligers,
        "plain": plain,
    }
    for name, compute in contestants.items():
        try:
            yield {f"{name}_{what}": value for what, value in _cost(compute, [states, head], device).items()}
        except (RuntimeError, ImportError) as e:  # plain torch may not fit
            yield {f"{name}_failed": float("nan")}
            print(f"{name}: {e}", file=sys.stderr)


def _cost(compute: Callable[[], Any], inputs: list[Any], device: str, repeats: int = 5) -> Figures:
    """Median milliseconds of forward and backward, and GB above what was held before."""
    import torch

    taken = []
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(1 + repeats):  # the first compiles and is not counted
        for tensor in inputs:
            tensor.grad = None
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        compute().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(1000 * (time.perf_counter() - started))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"ms": statistics.median(taken[1:]), "gb": (peak - held) / 1e9}


def _shared(device: str) -> list[str]:
    """All roles on one device."""
    if device == "cpu":
        return ["cluster.device=cpu", "model.dtype=bfloat16"]
    return ["cluster.device=cuda", "cluster.colocate=all", "model.dtype=bfloat16", "model.attention=varlen"]


def recipe(out: Path, device: str, shape: str, more: list[str]) -> Config:
    """The paper's recipe on random weights and rows of all LENGTHS, one after the other, which are made once."""
    made = out / "inputs" / shape / "made.json"
    if not made.is_file():
        overrides = synthetic(made.parent, shape, list(LENGTHS.values()), ROWS, "bfloat16")
        made.write_text(json.dumps(overrides))
    return settings(json.loads(made.read_text()), device, more)


def settings(fields: dict[str, Any], device: str, more: Sequence[str]) -> Config:
    """The paper's recipe with all roles on one device. Raises UserError where the recipe is not there."""
    if not RECIPE.is_file():
        raise UserError(f"{RECIPE}: is not there: run this in a clone of the repository")
    small = ["data.max_prompt_tokens=null", "learner.ranks=1", "learner.zero_stage=2"]
    return load_config(RECIPE, [fields, *small, *_shared(device), *more])
