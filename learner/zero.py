"""DeepSpeed: the configuration it gets, and where each parameter's fp32 master copy lives.

`fragments` is the one place that knows how the ZeRO stages lay out master weights and optimizer
state. EMA, checkpoints and export work on fragments and so are the same for every stage and any
number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from sdft_dist.config import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragment:
    """The part of one parameter's fp32 master copy that this rank owns."""

    name: str  # as in the Hugging Face state dict
    start: int  # offset in the flattened parameter
    master: torch.Tensor  # fp32 [n], a view into the optimizer's storage
    state: dict[str, torch.Tensor]  # exp_avg and exp_avg_sq, fp32 [n] views; empty before the first step


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`. Loss scaling over micro-batches and ranks is ours:
    the accumulation count is 1 and the boundary is set by hand."""
    optim, offload, stage = config.optim, config.learner.offload == "optimizer", config.learner.zero_stage
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.grad_clip,
        "zero_optimization": {
            "stage": stage,
            # Buckets sized for models of 0.001 to 8 billion parameters alike; "auto" is not available.
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 0,
            **({"offload_optimizer": {"device": "cpu", "pin_memory": True}} if offload else {}),
        },
        **({"data_types": {"grad_accum_dtype": "fp32"}} if config.learner.fp32_gradients else {}),
        "bf16": {"enabled": config.model.dtype == "bfloat16", "check_grad_overflow": True},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optim.learning_rate,
                "betas": list(optim.betas),
                "weight_decay": optim.weight_decay,
                "torch_adam": True,
                "fused": True,  # one pass over weights and moments
            },
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on CPU too
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


def add_gradients_directly(engine: Any) -> None:
    """At stage 2 on one rank, add gradients of bf16 weights to their fp32 sums as backward gives them, which moves 10
    bytes a parameter. DeepSpeed's way to them is through a bucket, a division by 1 and a message to itself: 34 bytes,
    in every micro-batch."""
    optimizer = engine.optimizer
    alone = torch.distributed.get_world_size() == 1 and engine.zero_optimization_stage() == 2
    if not alone or optimizer.cpu_offload or not hasattr(optimizer, "_get_compact_grad_partition_slice"):
        return
    if not all(map(optimizer._use_compact_grad_partition_buffer, range(len(optimizer.bit16_groups)))):
        return

    def add(param: torch.nn.Parameter, group: int) -> None:
        optimizer.setup_buckets()  # which its epilogue then empties
        name, gradient = optimizer.get_param_id(param), param.grad
        assert gradient is not None
        optimizer._get_compact_grad_partition_slice(group, 0, name, param.numel()).add_(gradient.view(-1))
        param.grad = None

    optimizer.process_gradients = add


def set_timeouts(timeout: timedelta) -> None:
    """Of all process groups: DeepSpeed makes some with torch's default of half an hour."""
    from torch.distributed import distributed_c10d

    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timeout, group)


def fragments(
    engine: Any, named_parameters: list[tuple[str, torch.nn.Parameter]], *, copies: bool = False
) -> Iterator[Fragment]:
    """This rank's fragments, in the order of `named_parameters`. Together the ranks' fragments cover
    every parameter once; with `copies`, what stage 0 keeps on every rank is in every rank's."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    stage = engine.zero_optimization_stage()
    for name, param in named_parameters:
        if stage == 3:
            yield _stage3_fragment(engine, name, param, rank)
        elif hasattr(param, "_hp_mapping"):
            mapping = param._hp_mapping  # None where this rank owns nothing of the parameter
            if mapping is not None:
                yield Fragment(
                    name=name,
                    start=mapping.lp_fragment_address.start,
                    master=mapping.hp_fragment,
                    state=dict(mapping.optim_fragment or {}),
                )
        else:
            # Stage 0 in fp32: the parameters are their own master copy, the same on every rank.
            flat = param.data.view(-1)
            share = flat.numel() if copies else -(-flat.numel() // world)
            start, end = (0, share) if copies else (rank * share, min((rank + 1) * share, flat.numel()))
            if start < end:
                full = {k: v for k, v in engine.optimizer.state.get(param, {}).items() if v.shape == param.shape}
                state = {k: v.view(-1)[start:end] for k, v in full.items()}
                yield Fragment(name=name, start=start, master=flat[start:end], state=state)


def _stage3_fragment(engine: Any, name: str, param: Any, rank: int) -> Fragment:
    share = param.ds_tensor.ds_numel
    start = rank * share
    size = max(0, min(share, param.ds_numel - start))  # the last rank's share may end in padding
    # DeepSpeed's own `get_local_fp32_param` gives a copy on the GPU of what is offloaded.
    optimizer = engine.optimizer
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(param)]
    flat, own = optimizer.fp32_partitioned_groups_flat[group], slice(offset, offset + size)
    state = {k: v[own] for k, v in optimizer.optimizer.state.get(flat, {}).items() if k != "step"}
    return Fragment(name=name, start=start, master=flat[own], state=state)


def step_and_norm(engine: Any) -> float:
    """Take the optimizer step; returns the global gradient norm before clipping. Where that is not a finite
    number, on all ranks alike, the step is left out and weights and moments stay as they are."""
    norm = None
    if not engine.zero_optimization():
        # Stage 0 clips without keeping the norm, and steps whatever it is; the gradients are reduced already.
        grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if not norm.isfinite():
            engine.optimizer.zero_grad()
            return float(norm)
    engine.step()
    return float(engine.get_global_grad_norm() if norm is None else norm)


def optimizer_step(engine: Any) -> int:
    """Updates that the optimizer has made, as its bias correction counts them."""
    return max((int(state["step"]) for state in _inner(engine).state.values()), default=0)


def make_optimizer_state(engine: Any, step: int) -> None:
    """AdamW's moments, all zero, as after `step` updates, where DeepSpeed makes them at the first one
    otherwise: so that `fragments` can be filled from a checkpoint."""
    optimizer, inner = engine.optimizer, _inner(engine)
    stage = engine.zero_optimization_stage()
    tensors = {
        0: lambda: [p for p in engine.module.parameters() if p.requires_grad],
        3: lambda: optimizer.fp32_partitioned_groups_flat,
    }.get(stage, lambda: optimizer.single_partition_of_fp32_groups)()
    for tensor in tensors:
        moments = {name: torch.zeros_like(tensor) for name in ("exp_avg", "exp_avg_sq")}
        inner.state[tensor] = {"step": torch.tensor(float(step), device=tensor.device), **moments}
    if stage in (1, 2):
        optimizer._lazy_init_hp_params_optimizer_state()


def _inner(engine: Any) -> Any:
    """The optimizer of torch inside DeepSpeed's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)
