"""What a dead actor wrote to its stderr, from Ray's log folder of this node."""

from __future__ import annotations

import re
from pathlib import Path

from sdft_dist.errors import brief

LINES, WIDTH = 20, 200  # a native crash prints a stack
BEGINNINGS = ("Fatal Python error", r"Traceback|\bError\b|terminate called|SIG[A-Z]+ received|out of memory")


def is_death(error: BaseException) -> bool:
    """Whether it tells of an actor's end, also by Ray's monitor of a node's memory."""
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

    return isinstance(error, RayActorError | OutOfMemoryError | NodeDiedError | WorkerCrashedError)


def obituary(error: BaseException) -> str:
    """The error in one line, and below it the last words of the actor of whose death it tells."""
    words = last_words(error)
    return "\n".join([brief(error) + ("; its last words:" if words else ""), *words])


def last_words(error: BaseException) -> list[str]:
    """What the actor whose death `error` tells of wrote to stderr about an error of its own; nothing where it was
    killed without a word, or lived on another node."""
    import ray

    pid = re.search(r"\bpid: (\d+)", str(error))
    node = ray._private.worker._global_node
    if pid is None or node is None:
        return []
    for path in Path(node.get_logs_dir_path()).glob(f"worker-*-{pid[1]}.err"):
        return _about_an_error(path.read_text(errors="replace"))
    return []


def _about_an_error(text: str) -> list[str]:
    lines = [line.rstrip()[:WIDTH] for line in text.splitlines() if line.strip()]
    for beginning in BEGINNINGS:
        for i, line in enumerate(lines):
            if re.search(beginning, line):
                return lines[i : i + LINES]
    return []
