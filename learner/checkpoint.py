"""Checkpoints as shards of named fp32 fragments, one safetensors file per rank.

Not DeepSpeed's own checkpoints: those are pickles, are written under a `latest` marker before all
shards are on disk, and are bound to one number of ranks. Fragments carry the parameter's name and
offset, so any number of ranks, any ZeRO stage, or no DeepSpeed at all can read them.
Keys read `kind|name|start`, where kind is master, ema, or an optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from learner.ema import Ema
from learner.zero import Fragment
from sdft_dist.errors import UserError


def save_shard(folder: Path, rank: int, fragments: Iterable[Fragment], ema: Ema | None) -> None:
    """Write `rank-NNN.safetensors` with this rank's fragments."""
    tensors: dict[str, torch.Tensor] = {}
    for f in fragments:
        for kind, value in {"master": f.master, **f.state}.items():
            tensors[f"{kind}|{f.name}|{f.start}"] = value.detach().cpu().contiguous().clone()
    for name, (start, average) in (ema.averages if ema else {}).items():
        tensors[f"ema|{name}|{start}"] = average.cpu()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"rank-{rank:03d}.safetensors")


def read_full(folder: Path, kind: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Whole fp32 tensors of one kind, put together from all shards.

    Raises UserError where the shards do not cover a parameter.
    """
    full = {name: torch.empty(shape, dtype=torch.float32) for name, shape in shapes.items()}
    covered = dict.fromkeys(shapes, 0)
    for path in sorted(folder.glob("rank-*.safetensors")):
        with safe_open(path, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118  # safe_open is no mapping
                found_kind, name, start = key.split("|")
                if found_kind == kind:
                    value = shard.get_tensor(key)
                    full[name].view(-1)[int(start) : int(start) + value.numel()] = value
                    covered[name] += value.numel()
    missing = [name for name, n in covered.items() if n != full[name].numel()]
    if missing:
        raise UserError(f"{folder}: {kind} weights of {len(missing)} parameters are incomplete, such as {missing[0]}")
    return full
