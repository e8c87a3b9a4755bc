"""Sends weights to vLLM engines: gathers one bucket at a time, casts, broadcasts, stamps a version.

All learner ranks take part in the gathering; rank 0 sends. What is gathered is either the student or
its EMA; see `WeightSource`.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from learner.ema import Ema
from sdft_dist.types import Bucket, WeightManifest
from sdft_dist.wire import pack, plan_buckets

WeightSource = Callable[[list[str]], dict[str, torch.Tensor]]  # names to full tensors; a collective


def student_source(named: dict[str, torch.nn.Parameter]) -> WeightSource:
    """Full student weights in the learner's type; gathers shards under ZeRO-3."""

    def gather(names: list[str]) -> dict[str, torch.Tensor]:
        params = [named[n] for n in names]
        if not hasattr(params[0], "ds_id"):
            return {n: p.data for n, p in zip(names, params, strict=True)}
        import deepspeed

        with deepspeed.zero.GatheredParameters(params):
            return {n: p.data.clone() for n, p in zip(names, params, strict=True)}

    return gather


def ema_source(ema: Ema, shapes: dict[str, tuple[int, ...]], device: torch.device) -> WeightSource:
    """Full EMA weights in fp32, summed from the ranks' fragments."""

    def gather(names: list[str]) -> dict[str, torch.Tensor]:
        full = {n: torch.zeros(shapes[n], dtype=torch.float32, device=device) for n in names}
        for name, tensor in full.items():
            own = ema.fragment(name)
            if own is not None:
                start, average = own
                tensor.view(-1)[start : start + len(average)] = average
        for work in [dist.all_reduce(t, async_op=True) for t in full.values()]:
            work.wait()
        return full

    return gather


class Sender:
    """Rank 0's end of one push group: itself and every engine worker of a role."""

    def __init__(self, host: str, num_receivers: int, timeout_s: float) -> None:
        self._host, self._size, self._timeout = host, num_receivers + 1, timedelta(seconds=timeout_s)
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=self._timeout)
        self.port = self._store.port
        self._group: Any = None

    def connect(self) -> None:
        """Waits until all receivers have joined."""
        self._group = dist.ProcessGroupGloo(self._store, 0, self._size, self._timeout)

    def send(self, bucket: Bucket, tensors: dict[str, torch.Tensor]) -> None:
        """Broadcast one bucket; returns when it has left."""
        self._group.broadcast(pack(bucket, tensors), 0).wait()


def manifest(
    version: int, shapes: dict[str, tuple[int, ...]], wire_dtype: torch.dtype, bucket_bytes: int
) -> WeightManifest:
    """The push's order and layout, the same on all ranks and receivers."""
    weights = [(name, wire_dtype, shape) for name, shape in shapes.items()]
    return WeightManifest(version=version, buckets=tuple(plan_buckets(weights, bucket_bytes)))


def push(plan: WeightManifest, source: WeightSource, sender: Sender | None) -> None:
    """Gather and send every bucket; `sender` is None on ranks other than 0."""
    for bucket in plan.buckets:
        tensors = source(list(bucket.names))
        if sender is not None:
            sender.send(bucket, tensors)
