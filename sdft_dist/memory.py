"""Peak memory: of this process, and of a tree of processes by sampling it."""

from __future__ import annotations

import os
import resource
import threading
from contextlib import suppress

import psutil


class PeakMemory:
    """Samples every two seconds while the block runs; `gib` holds the peak."""

    def __init__(self) -> None:
        self.gib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        # Consumes nothing, produces `gib`, waits for its interval, unblocked by the block's end.
        while not self._stop.wait(2):
            self.gib = max(self.gib, tree_bytes(os.getpid()) / 2**30)


def own_peak_gib(device: str) -> float:
    """Of this process since its start: allocated on its GPU for "cuda", else resident."""
    if device == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def tree_bytes(root: int) -> int:
    """Bytes held by `root` and its descendants; a page that several share counts once (PSS)."""
    total, process = 0, psutil.Process(root)
    for member in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):  # it ended just now
            total += member.memory_full_info().pss
    return total
