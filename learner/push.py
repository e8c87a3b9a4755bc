"""Sends weights to vLLM engines: gathers and casts one bucket at a time, broadcasts, stamps a version.

All learner ranks take part in the gathering; rank 0 sends. What is gathered is either the student or
its EMA; see `WeightSource`.
"""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist

from learner.ema import Ema
from sdft_dist.adapters import half_of
from sdft_dist.transport import Transport, connect
from sdft_dist.types import Bucket, TransportKind, WeightManifest
from sdft_dist.wire import pack, plan_buckets

HELD_BYTES = 1 << 30  # of messages that have not left, on a GPU; planning/memory.py counts it
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
            if name in ema.averages:  # else another rank owns it
                start, average = ema.averages[name]
                tensor.view(-1)[start : start + len(average)] = average
        for work in [dist.all_reduce(t, async_op=True) for t in full.values()]:
            work.wait()
        return full

    return gather


def together(frozen: WeightSource, adapters: WeightSource) -> WeightSource:
    """Adapters from one source, and what they are added to from another."""

    def gather(names: list[str]) -> dict[str, torch.Tensor]:
        halves = [n for n in names if half_of(n)]
        others = [n for n in names if not half_of(n)]
        return {**(frozen(others) if others else {}), **(adapters(halves) if halves else {})}

    return gather


class Sender:
    """Rank 0's end of one push group: itself and every engine worker of a role.

    Messages leave in a thread of their own, so that the learner goes on while engines take them in. In host memory
    all of a push may wait there, on a GPU HELD_BYTES.
    """

    def __init__(
        self, host: str, num_receivers: int, timeout_s: float, kind: TransportKind, device: torch.device
    ) -> None:
        self._kind, self._device = kind, device
        self._size, self._timeout = num_receivers + 1, timedelta(seconds=timeout_s)
        listener = socket.create_server((host, 0))  # on this address alone; the store would listen on all
        self.port = int(listener.getsockname()[1])
        self._store = dist.TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, timeout=self._timeout,
            master_listen_fd=listener.detach(),
        )  # fmt: skip
        self._transport: Transport | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="push")
        self._sending: list[Future[None]] = []

    def connect(self) -> None:
        """Waits until all receivers have joined."""
        self._transport = connect(self._kind, self._store, 0, self._size, self._timeout, self._device)

    def send(self, bucket: Bucket, tensors: dict[str, torch.Tensor]) -> None:
        """Copy one bucket and queue it."""
        assert self._transport is not None
        message = pack(bucket, tensors, self._transport.device)
        if message.is_cuda:
            torch.cuda.current_stream().synchronize()  # the thread has a stream of its own, or hands on memory as it is
            held = sum(not sent.done() for sent in self._sending)
            if held * message.numel() > HELD_BYTES:
                self._sending[-held].exception()  # waits for the oldest to leave
        self._sending.append(self._thread.submit(self._leave, message))

    def _leave(self, message: torch.Tensor) -> None:
        assert self._transport is not None
        try:
            self._transport.send(message)
        except Exception:
            traceback.print_exc()  # why; receivers only see that the connection is gone
            self._transport.close()  # so that they do not wait
            raise

    def flush(self) -> None:
        """Waits until everything has left, so that no more than one push is held in memory. What did not
        arrive, its receivers tell."""
        sending, self._sending = self._sending, []
        for sent in sending:
            sent.exception()

    def close(self) -> None:
        """Ends the thread; what has not left is dropped, and receivers that wait for it are told by their
        connections' end."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._transport is not None:
            self._transport.close()


def manifest(
    version: int, shapes: dict[str, tuple[int, ...]], wire_dtype: torch.dtype, bucket_bytes: int
) -> WeightManifest:
    """The push's order and layout, the same on all ranks and receivers. Adapters go in fp32: an engine adds them
    up in it, and rounds once."""
    weights = [(name, torch.float32 if half_of(name) else wire_dtype, shape) for name, shape in shapes.items()]
    return WeightManifest(version=version, buckets=tuple(plan_buckets(weights, bucket_bytes)))


def push(plan: WeightManifest, source: WeightSource, sender: Sender | None, keep: str | None) -> torch.Tensor | None:
    """Gather and send every bucket; `sender` is None on ranks other than 0. Returns a copy of the
    weight named `keep`, in the type on the wire, where it is among them."""
    if sender is not None:
        sender.flush()
    kept: torch.Tensor | None = None
    for bucket in plan.buckets:
        tensors = source(list(bucket.names))
        if sender is not None:
            sender.send(bucket, tensors)
        if keep is not None and keep in tensors:
            dtype = getattr(torch, bucket.dtypes[bucket.names.index(keep)])
            kept = tensors[keep].detach().to(dtype, copy=True)
    return kept
