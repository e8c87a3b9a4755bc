"""What a device reaches: the speed of a large matrix product, and of reading and writing memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Roofline(NamedTuple):
    """Of one rank's device, with the threads that it has."""

    device: str  # the name of the GPU, or "cpu"
    product_flops: float  # per second
    bandwidth: float  # bytes/s


def measure(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Best of five of each; takes about a second."""
    cuda = device.type == "cuda"
    size, words = (8192, 1 << 28) if cuda else (2048, 1 << 25)
    a = torch.randn(size, size, device=device).to(dtype)
    source, target = torch.zeros(words, device=device), torch.zeros(words, device=device)

    def seconds(act: Callable[[], object]) -> float:
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        act()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    product = min(seconds(lambda: a @ a) for _ in range(5))
    copying = min(seconds(lambda: target.copy_(source)) for _ in range(5))
    name = torch.cuda.get_device_name() if cuda else "cpu"
    return Roofline(name, 2 * size**3 / product, 2 * 4 * words / copying)
