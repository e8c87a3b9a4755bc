"""The memory that `sdft plan` predicts: GiB on one GPU of each role.

A learner needs most in one of two moments: in backward, with all that forward has kept, or in the optimizer's step.
"""

from __future__ import annotations

from sdft_dist.config import Config, LearnerConfig
from sdft_dist.planning.dimensions import Dimensions
from sdft_dist.topology import push_transport, sizes

CHUNK = 512 << 20  # learner/fused.py: of one fp32 [chunk, V] buffer on a GPU
PART = 2 << 30  # learner/checkpoint.py: of the state, copied at a time
OPTIMIZER_BYTES = 12  # of one trained parameter: its master weight and two moments
SUBGROUP = 10**9  # parameters that ZeRO-3 steps at a time


def memory_gib(config: Config, m: Dimensions, ranks: int) -> dict[str, float]:
    """Of one GPU of each role, without the KV cache, which takes what is left. bf16 weights; fp32 master
    weights, moments and EMA."""
    resident, training, pushing = learner_gib(config, m, ranks)
    engines = {role: sum(parts.values()) for role, parts in engine_parts(config, m).items()}
    return {"learner": resident + max(training, pushing), **engines}


def engine_parts(config: Config, m: Dimensions) -> dict[str, dict[str, float]]:
    """GiB on one GPU of each engine, without keys and values."""
    work = 2 * max(8192, config.model.max_length) * (4 * m.width + 2 * m.mlp_width)
    spans = {role: size.gpus for role, size in sizes(config).items() if role != "learner"}
    return {role: {"weights": 2 * m.total / n / 2**30, "activations": work / 2**30} for role, n in spans.items()}


def learner_gib(config: Config, m: Dimensions, ranks: int) -> tuple[float, float, float]:
    """What a learner always holds, and what it needs besides in an optimizer step and in a push."""
    gib = learner_parts(config, m, ranks)
    resident = sum(gib[part] for part in ("weights", "optimizer", "ema", "teacher_heads"))
    return resident, gib["gradients"] + max(gib["activations"], gib["step"]), gib["push"]


def learner_parts(config: Config, m: Dimensions, ranks: int) -> dict[str, float]:
    """GiB of a learner. Gradients, with activations and then with what the optimizer's step allocates, and a push are
    not there at the same time; `optimizer` is fp32 master weights and moments."""
    learner, stage, rank = config.learner, config.learner.zero_stage, config.model.lora.rank
    trained = m.adapters(rank) if rank else m.total
    weights = 2 * (m.total + (trained if rank else 0)) / (ranks if stage == 3 else 1)
    offload = learner.offload == "optimizer"
    gradients = (4 if learner.fp32_gradients else 2) * trained / (ranks if stage >= 2 else 1)
    owned = trained / (ranks if stage >= 1 else 1)
    ema = _state_bytes(config) - OPTIMIZER_BYTES
    step = 0 if offload else step_bytes(stage, owned, 0 if rank else m.head)
    backward = backward_bytes(m, learner, frozen_head=rank > 0)
    # What learner/push.py holds back at most, and the message that is being made.
    push = 0 if push_transport(config, "cuda") == "gloo" else (1 << 30) + (config.cluster.push_bucket_mib << 20)
    moving = not rank and config.teacher.moves
    heads = config.rollout.max_staleness + 2 if moving else 1  # of teachers, kept where the learner applies them
    versions = heads if config.method == "sdft" and config.loss.support == "full" else 0
    parts = {
        "weights": weights,
        "optimizer": 0 if offload else OPTIMIZER_BYTES * owned,
        "ema": 0 if offload else ema * owned,
        "teacher_heads": versions * 2 * m.head,
        "gradients": gradients,
        "activations": backward,
        "step": step,
        "push": push,
    }
    return {part: size / 2**30 for part, size in parts.items()}


def step_bytes(stage: int, owned: float, largest: float) -> float:
    """What DeepSpeed allocates besides the gradients in an optimizer step: at ZeRO-1 they are bf16, flattened and then
    in fp32; at 2 they are fp32 and flat already, and the norm takes one tensor at a time in float64; at 3 they are
    fp32 and are flattened group by group."""
    if stage == 2:
        return 8 * min(owned, largest)
    return 4 * min(owned, SUBGROUP) if stage == 3 else 6 * owned


def host_gib(config: Config, m: Dimensions, ranks: int) -> float:
    """What a learner rank keeps in host memory for `learner.offload`: fp32 master weights, moments and EMA; and
    DeepSpeed's gradients there, in fp32, and a bf16 copy."""
    return 0.0 if config.learner.offload == "none" else state_gib(config, m, ranks) * (1 + 6 / _state_bytes(config))


def saving_gib(config: Config, m: Dimensions, ranks: int) -> float:
    """What a learner rank needs of host memory besides, from a checkpoint's start until it is written: a copy of its
    state, or, where that is in host memory already, of a part of it at a time."""
    whole = state_gib(config, m, ranks)
    return whole if config.learner.offload == "none" else min(whole, PART / 2**30)


def state_gib(config: Config, m: Dimensions, ranks: int) -> float:
    """A rank's part of a checkpoint: its master weights, moments and EMA."""
    rank = config.model.lora.rank
    return _state_bytes(config) * (m.adapters(rank) if rank else m.total) / ranks / 2**30


def _state_bytes(config: Config) -> int:
    """Of one trained parameter, in fp32."""
    return OPTIMIZER_BYTES + (4 if config.teacher.kind == "ema" else 0)


def backward_bytes(m: Dimensions, learner: LearnerConfig, *, frozen_head: bool) -> int:
    """What layers keep of a micro-batch, what the divergence works on, and the head's gradient as it is summed up and
    as backward gets it."""
    layers = 2 * kept_for_backward(m, learner) * m.layers * learner.tokens_per_microbatch
    return layers + 4 * CHUNK + (0 if frozen_head else (4 + 2) * m.head)


def kept_for_backward(m: Dimensions, learner: LearnerConfig) -> int:
    """What one layer keeps of one token, in numbers of two bytes, with attention by FlashAttention.

    Queries, keys, values and attention's output count with every choice but `full`. Norms keep their input in fp32 (as
    two numbers), what they scale and what they give; compiled, only what they read.
    """
    attention, keys = m.heads * m.head_dim, m.kv_heads * m.head_dim
    if learner.gradient_checkpointing == "full":
        return m.width
    if learner.gradient_checkpointing == "selective":
        return 3 * m.width + 2 * (attention + keys) + 2 * m.mlp_width
    if learner.compile:
        norms = attention + keys if m.head_norms else 0
        return 4 * m.width + norms + 2 * (attention + keys) + 3 * m.mlp_width
    norms = 3 * (attention + keys) if m.head_norms else 0
    return 8 * m.width + norms + 2 * (attention + keys) + 4 * m.mlp_width
