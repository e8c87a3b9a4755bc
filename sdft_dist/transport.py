"""How the messages of a weight push travel from rank 0 of the learner to every process of the engines.

gloo  through host memory and sockets, between any machines
nccl  from GPU to GPU; every process has a GPU of its own
ipc   receivers map the sender's memory: all on one GPU or, without GPUs, on one machine

Messages are uint8 [n]. All ends send and receive the same ones in the same order.
"""

from __future__ import annotations

import json
import socket
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from sdft_dist.types import TransportKind

HANDLE_BYTES = 4096  # room for the handle of a storage, which takes some hundred


class Transport(Protocol):
    """One process's end. Every method raises RuntimeError where another end is gone or silent."""

    device: torch.device  # where messages are

    def send(self, message: torch.Tensor) -> None:
        """Returns when no receiver needs `message` any more; it must be whole in memory."""

    def receive(self, size: int) -> torch.Tensor:
        """The next message, uint8 [size]; to be read only until `taken`."""

    def taken(self) -> None:
        """Lets the sender go on: what `receive` gave last has been read."""

    def close(self) -> None:
        """Others that wait for this end are told, over gloo and ipc at once."""


def connect(
    kind: TransportKind, store: Any, rank: int, size: int, timeout: timedelta, device: torch.device
) -> Transport:
    """Waits until all `size` ends have joined; the sender is rank 0. `device` is this process's own."""
    if kind == "gloo":
        return Gloo(store, rank, size, timeout)
    cls = Nccl if kind == "nccl" else Ipc
    return cls(store, rank, size, timeout, device)


class Gloo:
    """Broadcasts in host memory."""

    device = torch.device("cpu")

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timeout
        # Left to itself it takes what this host's name resolves to, which is often 127.0.1.1.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=_own_address(store))]
        self.group: Any = dist.ProcessGroupGloo(store, rank, size, options)

    def send(self, message: torch.Tensor) -> None:
        self.group.broadcast(message, 0).wait()

    def receive(self, size: int) -> torch.Tensor:
        message = torch.empty(size, dtype=torch.uint8)
        self.send(message)
        return message

    def taken(self) -> None:
        """A receiver has a copy of its own."""

    def close(self) -> None:
        self.group = None


class Nccl:
    """Broadcasts between GPUs, beside what the process computes meanwhile."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta, device: torch.device) -> None:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        self.device = device
        self._group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        self._stream = torch.cuda.Stream(device)
        self.send(torch.zeros(1, dtype=torch.uint8, device=device))  # connects: here, where an error is told as such

    def send(self, message: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            self._group.broadcast(message, 0).wait()
            self._stream.synchronize()

    def receive(self, size: int) -> torch.Tensor:
        message = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # which may still read what was there before
        self.send(message)
        return message

    def taken(self) -> None:
        """A receiver has a copy of its own."""

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.abort()


class Ipc:
    """Sends handles of the sender's memory over gloo, and waits until all have read it."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta, device: torch.device) -> None:
        self._gloo = Gloo(store, rank, size, timeout)
        self.device = device

    def send(self, message: torch.Tensor) -> None:
        storage: Any = message.untyped_storage()
        fields = storage._share_cuda_() if message.is_cuda else storage._share_filename_cpu_()
        self._gloo.send(_as_message([message.storage_offset(), *fields]))
        self._everyone()

    def receive(self, size: int) -> torch.Tensor:
        offset, *fields = _from_message(self._gloo.receive(HANDLE_BYTES))
        storage: Any = torch.UntypedStorage
        opened = storage._new_shared_cuda if self.device.type == "cuda" else storage._new_shared_filename_cpu
        message = torch.empty(0, dtype=torch.uint8, device=self.device)
        return message.set_(opened(*fields), offset, (size,), (1,))

    def taken(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._everyone()

    def _everyone(self) -> None:
        self._gloo.group.barrier().wait()

    def close(self) -> None:
        self._gloo.close()


def _own_address(store: Any) -> str:
    """Of this machine on the way to the store."""
    family, kind, protocol, _, place = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as way:
        way.connect(place)  # sends nothing
        return str(way.getsockname()[0])


def _as_message(fields: list[Any]) -> torch.Tensor:
    """Numbers and bytes as uint8 [HANDLE_BYTES]."""
    text = json.dumps([f.decode("latin-1") if isinstance(f, bytes) else f for f in fields])
    return torch.frombuffer(bytearray(text.encode().ljust(HANDLE_BYTES)), dtype=torch.uint8)


def _from_message(message: torch.Tensor) -> list[Any]:
    fields = json.loads(message.numpy().tobytes())
    return [f.encode("latin-1") if isinstance(f, str) else f for f in fields]
