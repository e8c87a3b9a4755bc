"""Peak memory: of this process, and of a tree of processes by sampling /proc."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path
from types import TracebackType


class PeakMemory:
    """Samples every two seconds while the block runs; `gib` holds the peak, or None without /proc."""

    def __init__(self) -> None:
        self.gib: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        # Consumes nothing, produces `gib`, waits for its interval, unblocked by the block's end.
        while not self._stop.wait(2):
            total = tree_bytes(os.getpid())
            if total is not None:
                self.gib = max(self.gib or 0.0, total / 2**30)


def own_peak_gib(device: str) -> float:
    """Of this process since its start: allocated on its GPU for "cuda", else resident."""
    if device == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def tree_bytes(root: int) -> int | None:
    """Bytes held by `root` and its descendants; a page that several share counts once (PSS)."""
    if not Path("/proc/self/smaps_rollup").exists():
        return None
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except OSError:
                continue  # it ended just now
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    members = {root}
    while True:
        more = {pid for pid, parent in parents.items() if parent in members} - members
        if not more:
            return sum(_pss_bytes(pid) for pid in members)
        members |= more


def _pss_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:")), 0)
