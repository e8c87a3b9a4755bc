"""`sdft plan`: what a step costs and whether it fits, before anything is started.

Arithmetic only. Seconds per sample, for N body parameters, V · D head parameters, and P, D, C tokens of
prompt, demonstration and completion:
- SFT: 3 · (2N(P+C) + attention) + 6 · V·D · C floating-point operations;
- SDFT adds the student's prefill 2NP, decoding, the teacher's pass 2N(P+D+C) + attention, and its head
  2 · V·D · C in the learner; completions of one prompt share what the student reads of it, P, and the teacher, P+D;
- decoding one token: max(weight bytes / (batch · bandwidth), 2(N + V·D) / speed) plus the reading of the
  keys and values of P + C/2 tokens.
`bench` prints what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from sdft_dist.config import Config
from sdft_dist.errors import UserError
from sdft_dist.planning.dimensions import Dimensions
from sdft_dist.planning.memory import (
    engine_parts,
    host_gib,
    learner_gib,
    learner_parts,
    memory_gib,
    saving_gib,
    state_gib,
)
from sdft_dist.topology import needs


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One device: dense bf16 speed by the data sheet, what a large matrix product reaches, memory."""

    peak_flops: float
    product_flops: float
    bandwidth: float  # bytes/s, as reached
    memory_gib: float


GPUS = {
    "h200": Gpu(peak_flops=989e12, product_flops=790e12, bandwidth=4.3e12, memory_gib=139),
    "h100": Gpu(peak_flops=989e12, product_flops=700e12, bandwidth=3.0e12, memory_gib=79),
    "a100": Gpu(peak_flops=312e12, product_flops=270e12, bandwidth=1.7e12, memory_gib=79),
}
LEARNER_MFU = 0.45  # of peak_flops
INFERENCE_EFFICIENCY = 0.6  # of product_flops and bandwidth
WAITS = 2.0  # times the cost of work alone, above which the table says that GPUs wait
ROLES = ("generator", "teacher", "learner")
USABLE = 0.92  # share of a GPU's memory that one may count on


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens."""

    prompt: int
    demonstration: int
    completion: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Seconds:
    """Device-seconds per sample of each role; `sft` is the learner's of plain SFT."""

    sft: float
    learner: float
    generator: float
    teacher: float

    @property
    def ratio(self) -> float:
        """SDFT over SFT."""
        return (self.learner + self.generator + self.teacher) / self.sft


def flops(m: Dimensions, n: Lengths, completions_per_prompt: int = 1) -> dict[str, float]:
    """Floating-point operations per sample that each role's model needs, with what completions of one prompt share
    counted once; recomputation earns no credit."""
    sft = 3 * m.forward_flops(n.prompt + n.completion) + 6 * m.head * n.completion
    shared = 1 - 1 / completions_per_prompt
    read, shown = m.forward_flops(n.prompt), m.forward_flops(n.prompt + n.demonstration)
    return {
        "sft": sft,
        "learner": sft + 2 * m.head * n.completion,
        "generator": m.forward_flops(n.prompt + n.completion) - shared * read + 2 * m.head * n.completion,
        "teacher": m.forward_flops(n.prompt + n.demonstration + n.completion) - shared * shown,
    }


def token_seconds(m: Dimensions, n: Lengths, gpu: Gpu, decode_batch: float, efficiency: float) -> float:
    """Of decoding one token of one request among `decode_batch`."""
    weights = 2 * (m.body + m.head)  # bytes, and operations per token
    speed, bandwidth = efficiency * gpu.product_flops, efficiency * gpu.bandwidth
    keys_and_values = m.kv_bytes * (n.prompt + n.completion / 2) / bandwidth
    return max(weights / (decode_batch * bandwidth), weights / speed) + keys_and_values


def seconds(
    m: Dimensions,
    n: Lengths,
    gpu: Gpu,
    *,
    decode_batch: float,
    completions_per_prompt: int = 1,
    efficiency: float = INFERENCE_EFFICIENCY,
) -> Seconds:
    """The model of the module's docstring."""
    learner, speed = LEARNER_MFU * gpu.peak_flops, efficiency * gpu.product_flops
    work = flops(m, n, completions_per_prompt)
    decoding = token_seconds(m, n, gpu, decode_batch, efficiency) * n.completion
    return Seconds(
        sft=work["sft"] / learner,
        learner=work["learner"] / learner,
        generator=m.forward_flops(n.prompt) / completions_per_prompt / speed + decoding,
        teacher=work["teacher"] / speed,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What is predicted for one number of GPUs."""

    gpus: int
    split: dict[str, int]  # GPUs of each role
    groups: tuple[tuple[str, ...], ...]  # roles that share GPUs
    decode_batch: float
    decode_limit: float  # requests that one generator has room for
    seconds: Seconds
    step_s: float
    ratio_with_waiting: float  # GPU-seconds per sample, SDFT over SFT, idle GPUs counted in
    bottleneck: str
    idle_share: dict[str, float]
    memory_gib: dict[str, float]  # of one GPU of the role, without keys and values
    memory_parts_gib: dict[str, dict[str, float]]  # the same by what holds it, keys and values ("kv") too
    host_gib: float  # of one learner rank, for learner.offload and a checkpoint that is being written
    checkpoint_gib: float  # on disk
    checkpoint_gib_per_s: float  # that the disk must take for a checkpoint to be saved within checkpoint.grace_s
    fits: bool


def own_plan(config: Config, m: Dimensions, n: Lengths, gpu: Gpu) -> Prediction:
    """What the recipe itself asks for. Raises UserError for a method without a teacher."""
    wanted = needs(config, "cuda")
    split = {role: need.number * need.gpus for need in wanted for role in need.roles}
    return _plan(config, m, n, gpu, split, [need.roles for need in wanted])


def plan(config: Config, m: Dimensions, n: Lengths, gpu: Gpu, gpus: int) -> Prediction:
    """The fastest split of `gpus` that fits, or the fastest where none fits. One GPU is shared by all roles, the
    second of two by both engines. Raises UserError where there are too few for the GPUs that an engine spans, and for
    a method without a teacher."""
    spans = config.cluster.generator_tensor_parallel, config.cluster.teacher_tensor_parallel
    if gpus <= 2 and spans == (1, 1):
        shared = [ROLES] if gpus == 1 else [("learner",), ("generator", "teacher")]
        sharing = {"colocate": "all" if gpus == 1 else "teachers", "push_transport": "auto"}
        return _plan(config.changed(cluster=sharing), m, n, gpu, dict.fromkeys(ROLES, 1), shared)
    generators, teachers = (span * max(1, gpus // (64 * span)) for span in spans)
    splits = [
        {"generator": g, "teacher": t, "learner": gpus - g - t}
        for g in range(generators, gpus, generators)
        for t in range(teachers, gpus - g, teachers)
    ]
    if not splits:
        raise UserError(
            f"--gpus {gpus}: engines that span {spans[0]} and {spans[1]} GPUs (cluster.generator_tensor_parallel, "
            f".teacher_tensor_parallel) and a learner need {sum(spans) + 1}"
        )
    config = config.changed(cluster={"colocate": "none", "push_transport": "auto"})
    plans = [_plan(config, m, n, gpu, split, [(role,) for role in ROLES]) for split in splits]
    return min(plans, key=lambda p: (not p.fits, p.step_s))


def _plan(
    config: Config, m: Dimensions, n: Lengths, gpu: Gpu, split: dict[str, int], groups: Sequence[tuple[str, ...]]
) -> Prediction:
    """`groups` are the roles that share GPUs, and `split` the GPUs of each role."""
    if config.method != "sdft":
        raise UserError(f"sdft plan: is about method=sdft, with all three roles; this is {config.method}")
    cluster, copies = config.cluster, config.rollout.completions_per_prompt
    batch = config.rollout.prompts_per_step * copies
    memory = memory_gib(config, m, split["learner"])
    usable = USABLE * gpu.memory_gib
    engines = engine_parts(config, m)
    reserve = {role: cluster.engine_memory(role) * gpu.memory_gib for role in engines}  # on one GPU, for all it holds
    room = {role: reserve[role] - memory[role] for role in engines}  # for keys and values
    parts = {"learner": learner_parts(config, m, split["learner"])}
    parts |= {role: own | {"kv": max(0.0, room[role])} for role, own in engines.items()}
    held = [sum(memory[role] if role == "learner" else reserve[role] for role in group) for group in groups]
    if cluster.sleep:  # then all roles share each GPU, and engines hold nothing while the learner works
        resident, training, pushing = learner_gib(config, m, split["learner"])
        held = [resident + max(training, sum(reserve.values()) + pushing)]
    spans = cluster.generator_tensor_parallel
    in_flight = batch * (1 + config.rollout.max_staleness) / max(1, split["generator"] // spans)
    kv_limit = max(1.0, room["generator"] * spans * 2**30 / (m.kv_bytes * (n.prompt + n.completion)))
    decode_limit = min(cluster.max_sequences, kv_limit)
    decode_batch = min(in_flight, decode_limit)
    cost = seconds(m, n, gpu, decode_batch=decode_batch, completions_per_prompt=copies)
    times = {role: batch * getattr(cost, role) / split[role] for role in split}
    taken = [sum(times[role] for role in group) for group in groups]  # who shares a GPU takes turns
    step_s = max(taken) if config.rollout.max_staleness else sum(taken)
    gpus = sum(split[group[0]] for group in groups)
    return Prediction(
        gpus=gpus,
        split=split,
        groups=tuple(groups),
        decode_batch=decode_batch,
        decode_limit=decode_limit,
        seconds=cost,
        step_s=step_s,
        ratio_with_waiting=gpus * step_s / batch / cost.sft,
        bottleneck=max(times, key=lambda role: times[role]),
        idle_share={role: 1 - t / step_s for role, t in times.items()},
        memory_gib=memory,
        memory_parts_gib=parts,
        host_gib=host_gib(config, m, split["learner"]) + saving_gib(config, m, split["learner"]),
        checkpoint_gib=state_gib(config, m, 1),
        checkpoint_gib_per_s=state_gib(config, m, 1) / config.checkpoint.grace_s,
        fits=min(room.values()) > 0 and max(held) <= usable,
    )


def as_json(plans: list[Prediction]) -> list[dict[str, Any]]:
    """Plain data."""
    return [{**asdict(p), "device_seconds_ratio": p.seconds.ratio} for p in plans]


def _parts(gib: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {size:.1f}" for name, size in gib.items() if size)


def show(plans: list[Prediction], console: Console) -> None:
    """One line for each number of GPUs."""
    first, say = plans[0], partial(console.print, highlight=False)
    cost = first.seconds
    say(
        f"Device-seconds per sample at a decode batch of {first.decode_batch:.0f}: SFT {cost.sft:.3g}; "
        f"SDFT {cost.learner:.3g} learner + {cost.generator:.3g} generator + {cost.teacher:.3g} teacher = "
        f"{cost.ratio:.2f} times SFT"
    )
    table = Table(title="Predicted, not measured")
    columns = ("GPUs", "gen/tea/lea", "batch", "s/step", "SDFT/SFT", "slowest", "GiB", "fits")
    for column in columns:
        table.add_column(column, justify="right", min_width=len(column))
    for p in plans:
        sizes = "/".join(f"{p.memory_gib[role]:.0f}" for role in ROLES)
        shared = [group for group in p.groups if len(group) > 1]
        split = "/".join(str(p.split[role]) for role in ROLES)
        split += "".join(" all shared" if len(g) == len(ROLES) else " engines shared" for g in shared)
        row = (p.gpus, split, f"{p.decode_batch:.0f}", f"{p.step_s:.2f}", f"{p.ratio_with_waiting:.2f}", p.bottleneck)
        table.add_row(*map(str, row), sizes, "yes" if p.fits else "NO")
    console.print(table)
    best = next((p for p in plans if p.fits), first)
    held = "; ".join(f"{role}: {_parts(best.memory_parts_gib[role])}" for role in ROLES)
    say(f"GiB on one GPU of {best.gpus}: {held} (gradients with activations, then with the optimizer's step)")
    if best.ratio_with_waiting > WAITS * best.seconds.ratio:
        say(
            f"On {best.gpus} GPUs most of their time is waiting: raise rollout.prompts_per_step, and "
            "rollout.max_staleness where it is 0."
        )
    sizes = ", ".join(f"{p.host_gib:.0f} on {p.gpus}" for p in plans)
    say(
        f"Host memory of each learner rank, GiB by GPUs, with a checkpoint being written: {sizes}. A checkpoint on "
        f"disk: {first.checkpoint_gib:.0f} GiB; to be saved within checkpoint.grace_s it must take "
        f"{first.checkpoint_gib_per_s:.1f} GiB/s"
    )
    if not any(p.fits for p in plans):
        say(
            "Nothing fits. Try learner.offload=optimizer, a larger size (deploy/recipes/sizes), or adapters "
            "(model.lora.rank=32)."
        )
    say(
        "gen/tea/lea: GPUs of generators, teachers and learner. "
        "batch: requests that one generator decodes at a time. "
        "SDFT/SFT: GPU-seconds per sample with waiting counted in. "
        "GiB: memory on one GPU of each role, without keys and values, which take what is left."
    )
