"""All that is to be measured on a GPU, in one go, with one table last: `python -m sdft_dist.gpu_check --out FOLDER`.

Each check is a process of its own with a time limit, so that one that fails costs one line and frees all memory. Roles
are measured one by one, on the learner's GPU: `SDFT/SFT` is the sum of their seconds over those of plain SFT.
`--device cpu --shape lab` tries the whole of it without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sdft_dist.config import Config, load_config
from sdft_dist.errors import UserError

RECIPE = Path(__file__).parent.parent / "deploy" / "recipes" / "paper.yaml"
LENGTHS = {"short": "300/400/400", "long": "1000/600/600"}
DECODE = (64, 256, 128)  # requests at a time; SDFT/SFT goes by the last: four steps of 32 in flight
SMALL_DECODE = (2, 8, 4)
LOSS = {"tokens": 8192, "width": 4096, "vocab": 128_256}
SMALL_LOSS = {"tokens": 64, "width": 4096, "vocab": 2048}
LIMIT_S = 240  # of one check
TUNED = ("learner.compile=true", "learner.gradient_checkpointing=none")  # of SFT and SDFT alike
SLOWER = {  # what the choice of TUNED and of varlen stands against
    "eager": ("learner.compile=false", "learner.gradient_checkpointing=selective"),
    "sdpa": ("model.attention=sdpa",),
}
OFFLOADED = (  # without an average, which would be in host memory too
    "learner.offload=optimizer", "learner.gradient_checkpointing=full", "teacher.kind=base",
)  # fmt: skip
Figures = dict[str, float]


def main() -> None:
    """Run all checks, or one of them for itself."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--shape", default="qwen3-4b", help="of `sdft bench --synthetic-model` (default: %(default)s)")
    parser.add_argument("--large", default="qwen3-8b", help="the shape that is tried with optimizer offload")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit", type=int, default=LIMIT_S, help="seconds of one check (default: %(default)s)")
    parser.add_argument("--skip", nargs="*", default=[], help="names of checks to leave out")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    checks = all_checks(args)
    if args.only:
        print(json.dumps(checks[args.only]()))
        return
    args.out.mkdir(parents=True)
    table = Table("check", "figure", "value", "seconds")
    for name in checks:
        if name in args.skip:
            continue
        started = time.monotonic()
        found = _in_a_process(name, args)
        Console(stderr=True).print(f"{name}: {found}", highlight=False)
        (args.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        seconds = f"{time.monotonic() - started:.0f}"
        for figure, value in found.items():
            table.add_row(name, figure, f"{value:.4g}" if isinstance(value, float) else str(value), seconds)
            name = seconds = ""
    for length in LENGTHS:
        names = [f"{part}-{length}" for part in ("learner", "generator", "teacher", "sft")]
        parts = [_figure(args.out, name, "device_s") for name in names]
        if None not in parts:
            *ours, sft = [part for part in parts if part is not None]
            table.add_row(f"SDFT/SFT, {LENGTHS[length]}", "device-seconds per sample", f"{sum(ours) / sft:.3f}", "")
    Console().print(table)


def _in_a_process(name: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "sdft_dist.gpu_check", "--only", name, "--out", str(args.out)]
    command += ["--shape", args.shape, "--large", args.large, "--device", args.device]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            printed, said = process.communicate(timeout=args.limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # so that Ray ends all of it before the next check needs the memory
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=60)
            process.kill()
            return {"failed": f"not done in {args.limit} s"}
    (args.out / f"{name}.log").write_text(said)
    if process.returncode:
        return {"failed": (said.strip().splitlines() or [f"exit code {process.returncode}"])[-1]}
    return dict(json.loads(printed.strip().splitlines()[-1]))


def _figure(out: Path, name: str, figure: str) -> float | None:
    path = out / f"{name}.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found.get(figure)


def all_checks(args: argparse.Namespace) -> dict[str, Callable[[], Figures]]:
    """By name what each one measures; the lab first, on whose run the second stands."""
    checks: dict[str, Callable[[], Figures]] = {
        "lab": partial(lab, args.out, args.device),
        "agreement": partial(agreement, args.out),
        "targets": partial(targets, args.out),
        "push": partial(push, args.out, args.device, args.shape),
        "loss": partial(loss, args.device, **(LOSS if args.device == "cuda" else SMALL_LOSS)),
    }
    decode = DECODE if args.device == "cuda" else SMALL_DECODE
    for length in LENGTHS:
        measure = partial(role, args.out, args.device, args.shape, length)
        checks[f"sft-{length}"] = partial(measure, "learner", [32], method="sft")
        checks[f"learner-{length}"] = partial(measure, "learner", [32])
        checks[f"teacher-{length}"] = partial(measure, "teacher", [64])
        checks[f"generator-{length}"] = partial(measure, "generator", decode)
    large = partial(role, args.out, args.device, args.large, "short", "learner", [16])
    checks["large"] = partial(large, more=OFFLOADED)
    sft = partial(role, args.out, args.device, args.shape, "short", "learner", [32], method="sft")
    for name, fields in SLOWER.items():
        checks[f"sft-short-{name}"] = partial(sft, more=fields)
    return checks


def lab(out: Path, device: str) -> Figures:
    """The lab's word taught in the device's own type: accuracy on it and on the old skills."""
    from sdft_dist.demo import lab_config, measured
    from sdft_dist.lab.base import shipped_base
    from sdft_dist.train import run

    steps = None if device == "cuda" else 2
    config = lab_config(out / "lab", shipped_base(), 0, "sdft", steps, _shared(device))
    run(config)
    found = measured(config)
    return {"new": found.curve[-1]["new"], "old": found.old(found.curve[-1]), "samples_per_s": found.samples_per_s}


def agreement(out: Path) -> Figures:
    """Log-probs of sampled tokens, generator against learner, nats."""
    from sdft_dist.preflight import preflight

    found = preflight(load_config(out / "lab" / "seed-0" / "sdft.yaml"), 64)
    return {"mean": found.logprob_difference_mean, "max": found.logprob_difference_max}


def targets(out: Path) -> Figures:
    """The teacher's states in the engine against a local model's, by token: the difference's norm over the state's."""
    import numpy as np
    import ray
    import torch

    from learner.model import load_causal_lm
    from sdft_dist.bench import contestant
    from sdft_dist.bench_roles import as_sampled
    from sdft_dist.cluster import launch, ray_session, resolve_device
    from sdft_dist.loop import batch_keys
    from sdft_dist.pieces import fetch

    ours = contestant(load_config(out / "lab" / "seed-0" / "sdft.yaml"), "sdft", out / "targets", fixed=False)
    config, problems, device = ours.config, ours.problems, resolve_device(ours.config)
    keys = batch_keys(config, problems, 0)
    with ray_session(config), launch(config, problems, ours.vocab_size, [], engines=("teacher",)) as fleet:
        fleet.to_teachers(0)
        scored = ray.get(fleet.teachers.actors[0].score.remote(as_sampled(config, problems, keys)))
        found = fetch([item.targets for item in scored.items])
    model = load_causal_lm(config.model).eval().to(device)
    differences = []
    for item, theirs in zip(scored.items, found, strict=True):
        problem = problems[item.key.problem]
        ids = np.concatenate([problem.teacher_prompt_ids, problem.demonstration_ids])
        with torch.no_grad():
            states = model.model(torch.from_numpy(ids.astype(np.int64))[None].to(device)).last_hidden_state[0]
        own = states[len(problem.teacher_prompt_ids) - 1 : -1].float().cpu()
        other = torch.from_numpy(theirs.states.copy())
        other = (other.view(torch.bfloat16) if theirs.dtype == "bfloat16" else other).float()
        differences.append((own - other).norm(dim=-1) / own.norm(dim=-1))
    every = torch.cat(differences)
    return {"mean": every.mean().item(), "max": every.max().item()}


def push(out: Path, device: str, shape: str) -> Figures:
    """Seconds of whole pushes to a generator and a teacher that share the learner's device, each of which checks
    every message's sum; medians of 3 after the first."""
    from sdft_dist.bench import contestant
    from sdft_dist.cluster import launch, ray_session
    from sdft_dist.topology import push_transport

    # Adapters without effect on what is pushed the first time; without them three tenants of one GPU are too many.
    config = recipe(out, device, shape, "short", ["model.lora.rank=1", *_room(device, 0.2)])
    ours = contestant(config, "sdft", out / "push", fixed=True)
    spans: dict[str, list[float]] = {}

    def note(role: str, index: int, span: Any) -> None:
        spans.setdefault(f"{role}_{span.what.replace(' ', '_')}_s", []).append(span.end - span.start)

    with ray_session(config), launch(config, ours.problems, ours.vocab_size, [], on_span=note) as fleet:
        for version in range(4):
            for pool in (fleet.generators, fleet.teachers):
                fleet.learner.open_push(pool)  # after which a push is of all weights
                started = time.perf_counter()
                fleet.learner.push(pool, version, version, wait=True)
                spans.setdefault(f"{pool.role}_s", []).append(time.perf_counter() - started)
        peaks = fleet.peak_gib()
    print(f"over {push_transport(config, device)}", file=sys.stderr)
    medians = {name: statistics.median(taken[1:]) for name, taken in spans.items()}
    return {**medians, **{f"{name}_peak_gib": gib for name, gib in peaks.items()}}


def role(
    out: Path,
    device: str,
    shape: str,
    length: str,
    which: str,
    batches: Sequence[int],
    *,
    method: str = "sdft",
    more: tuple[str, ...] = (),
) -> Figures:
    """One role by itself on random weights of a published shape; its figures are of the last batch, and
    tokens/s of each."""
    import torch

    from sdft_dist.bench_roles import bench_batches
    from sdft_dist.dimensions import read_dimensions
    from sdft_dist.plan_memory import host_gib, memory_gib

    fields = [f"method={method}", *TUNED, *more, *([] if method == "sdft" else ["teacher.kind=base"])]
    if which != "learner":  # beside a learner that has next to nothing, so that keys and values find room
        fields += ["model.lora.rank=1", *_room(device, 0.6)]
    config = recipe(out, device, shape, length, fields)
    needed = host_gib(config, read_dimensions(config), 1)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if needed > there:
        raise UserError(f"{shape}: its optimizer needs {needed:.0f} GiB of host memory, {there:.0f} are there")
    folder = out / "-".join([shape, which, length, method, *more])
    reports = bench_batches(config, folder, which, batches, repeats=3, fixed=True)
    rates = {f"tokens_per_s_at_{report['batch']}": report["tokens_per_s"]["median"] for report in reports}
    predicted = memory_gib(config, read_dimensions(config), 1)[which]
    if device == "cuda" and which != "learner":  # whose keys and values take what is left of its share
        predicted = config.cluster.engine_memory * torch.cuda.mem_get_info()[1] / 2**30
    return {**rates, **reports[-1]["account"], "predicted_gib": predicted}


def loss(device: str, *, tokens: int, width: int, vocab: int) -> Figures:
    """The full-vocabulary loss, forward and backward: ours, Liger's, and plain torch's, ms and GB."""
    import torch

    from learner import fused, liger
    from learner.fused import Objective, Targets

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    make = partial(torch.randn, device=device, dtype=dtype)
    states, head = make(tokens, width).requires_grad_(), (make(vocab, width) / width**0.5).requires_grad_()
    teacher_states, teacher_head = make(tokens, width), make(vocab, width) / width**0.5
    weights = torch.full((tokens,), 1 / tokens, device=device)
    labels = torch.zeros(tokens, dtype=torch.int64, device=device)
    targets = Targets(labels_T=labels, states_TD=teacher_states, heads=((tokens, teacher_head),))

    def ours() -> Any:
        return fused.weighted_loss(states, head, weights, targets, Objective(kind="full"), vocab_size=vocab).total

    def ligers() -> Any:
        plain = Objective(kind="full", liger_beta=0.0)
        return liger.weighted_loss(states, head, weights, targets, plain, vocab_size=vocab).total

    def plain() -> Any:
        logp, logq = ((s @ h.T).float().log_softmax(-1) for s, h in ((states, head), (teacher_states, teacher_head)))
        return ((logq.exp() * (logq - logp)).sum(-1) * weights).sum()

    found: Figures = {}
    for name, compute in (("ours", ours), ("liger", ligers), ("plain", plain)):
        try:
            found |= {f"{name}_{what}": value for what, value in _cost(compute, [states, head], device).items()}
        except (RuntimeError, ImportError) as e:  # plain torch may not fit
            found[f"{name}_failed"] = float("nan")
            print(f"{name}: {e}", file=sys.stderr)
    return found


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
    """All roles on one device, in its own type."""
    if device == "cpu":
        return ["cluster.device=cpu", "model.dtype=float32"]
    return ["cluster.device=cuda", "cluster.colocate=all", "model.dtype=bfloat16", "model.attention=varlen"]


def _room(device: str, share: float) -> list[str]:
    """For each engine, of the device's memory."""
    return [f"cluster.gpu_memory_utilization={share}"] if device == "cuda" else []


def recipe(out: Path, device: str, shape: str, length: str, more: list[str]) -> Config:
    """The paper's recipe on random weights, which are made once for all lengths."""
    from sdft_dist.synthetic import parse_lengths, synthetic, write_model

    folder = out / "inputs" / f"{shape}-{length}"
    made = folder / "made.json"
    if not made.is_file():
        dtype, model = "bfloat16" if device == "cuda" else "float32", out / "inputs" / shape
        if not model.is_dir():
            longest = max(sum(parse_lengths(lengths)) for lengths in LENGTHS.values())
            write_model(model, shape, dtype, longest + 16)
        made_of = synthetic(folder, shape, LENGTHS[length], 512, dtype, model)
        made.write_text(json.dumps(made_of))
    fields = [f"{key}={value}" for key, value in json.loads(made.read_text()).items()]
    if not RECIPE.is_file():
        raise UserError(f"{RECIPE}: is not there: run this in a clone of the repository")
    small = ["data.max_prompt_tokens=null", "learner.ranks=1", "learner.zero_stage=1"]
    return load_config(RECIPE, [*fields, *small, *_shared(device), *more])


if __name__ == "__main__":
    main()
