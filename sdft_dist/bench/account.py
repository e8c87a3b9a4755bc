"""What a role took beside what it could: utilisation, the plan's predictions, peak memory, waiting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdft_dist.config import Config
from sdft_dist.planning.dimensions import Dimensions, read_dimensions
from sdft_dist.planning.memory import memory_gib
from sdft_dist.planning.plan import GPUS, Gpu, Lengths, flops, seconds
from sdft_dist.topology import sizes

WORK = {"generator": "decode", "teacher": "score", "learner": "train"}  # spans in which a role does its own work
SYNC = ("load weights", "gather weights")  # an actor's own part in a push


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The devices of one run: what one reaches, as rank 0 of the learner measures it, and what the busiest actor of
    each role has held at most."""

    device: str
    product_flops: float  # per second
    bandwidth: float  # bytes/s
    peak_gib: Mapping[str, float]


def mean_lengths(problems: Sequence[Any], completion: float) -> Lengths:
    """Of `problems`, with completions of `completion` tokens; what the teacher reads besides prompt and
    completion counts as the demonstration."""
    prompt = sum(len(p.prompt_ids) for p in problems) / len(problems)
    teacher = sum(len(p.teacher_prompt_ids) for p in problems) / len(problems)
    return Lengths(prompt=round(prompt), demonstration=round(teacher - prompt), completion=round(completion))


def processed(n: Lengths) -> dict[str, int]:
    """Tokens per sample that each role reads or, a generator, writes."""
    trained = n.prompt + n.completion
    return {
        "generator": n.completion,
        "teacher": n.prompt + n.demonstration + n.completion,
        "learner": trained,
        "sft": trained,
    }


def accounts(
    config: Config, lengths: Lengths, machine: Machine, device_s: Mapping[str, float], decode_batch: float
) -> dict[str, dict[str, float]]:
    """What each role takes. `device_s` holds device-seconds per sample by role ("sft": the learner's without a
    teacher). Beside them stand what the plan predicts, tokens per device-second, peak memory with the plan's figure
    where it knows the GPU, and `mfu`: the share of the device's peak that the model's own operations need. The peak is
    the data sheet's where plan.GPUS has the device, else that of a large product."""
    m, gpu, copies = read_dimensions(config), _gpu(config, machine), config.rollout.completions_per_prompt
    work, tokens, gib = flops(m, lengths, copies), processed(lengths), _predicted_gib(config, m, gpu)
    predicted = seconds(m, lengths, gpu, decode_batch=decode_batch, completions_per_prompt=copies)
    return {
        role: {
            "device_s": taken,
            "predicted_s": getattr(predicted, role),
            "tokens_per_device_s": tokens[role] / taken,
            "mfu": work[role] / taken / gpu.peak_flops,
            "peak_gib": machine.peak_gib["learner" if role == "sft" else role],
            **({"predicted_gib": gib["learner" if role == "sft" else role]} if gib else {}),
        }
        for role, taken in device_s.items()
    }


def _predicted_gib(config: Config, m: Dimensions, gpu: Gpu) -> dict[str, float]:
    """GiB that the plan predicts on one GPU, by role; {} where the GPU is not known. An engine takes its whole share:
    keys and values fill what the rest leaves."""
    if not gpu.memory_gib:
        return {}
    engines = {role: config.cluster.engine_memory(role) * gpu.memory_gib for role in ("generator", "teacher")}
    return {"learner": memory_gib(config, m, config.learner.ranks)["learner"], **engines}


def _gpu(config: Config, machine: Machine) -> Gpu:
    """The device for the plan's arithmetic, which takes a weight to have two bytes."""
    known = next((gpu for name, gpu in GPUS.items() if name in machine.device.lower()), None)
    return Gpu(
        peak_flops=known.peak_flops if known else machine.product_flops,
        product_flops=machine.product_flops,
        bandwidth=machine.bandwidth / (2 if config.model.dtype == "float32" else 1),
        memory_gib=known.memory_gib if known else 0.0,
    )


def time_shares(busy: dict[str, float], config: Config) -> dict[str, dict[str, float]]:
    """Shares of its time that one actor of each role gives to `work`; to `weights`, waiting for a push's messages; to
    `sync`, loading weights or, a learner, gathering them; and to `data`, for which it waits in the rest. `busy` holds
    shares added up over all actors of a role."""
    found = {}
    for role, size in sizes(config).items():
        spent = {what: busy.get(f"{role}/{what}", 0.0) / size.actors for what in (WORK[role], "await weights", *SYNC)}
        work, weights, sync = spent[WORK[role]], spent["await weights"], sum(spent[what] for what in SYNC)
        found[role] = {"work": work, "weights": weights, "sync": sync, "data": max(0.0, 1 - work - weights - sync)}
    return found


def push_split(shares: Mapping[str, Mapping[str, float]], step_s: float) -> dict[str, float]:
    """Seconds that one actor of each role gives to pushes in a step of `step_s`, of its `time_shares`. A generator
    pauses while it waits for the messages and while it loads them."""
    found = {"learner_gather_s": shares["learner"]["sync"] * step_s}
    for role in ("teacher", "generator"):
        found[f"{role}_wire_s"], found[f"{role}_load_s"] = (shares[role][w] * step_s for w in ("weights", "sync"))
    return found | {"generator_pause_s": found["generator_wire_s"] + found["generator_load_s"]}
