"""What a dead actor wrote to its stderr, from Ray's log folder of this node."""

from __future__ import annotations

import re
from pathlib import Path

from sdft_dist.errors import brief

LINES = 20  # a native crash prints a stack


def obituary(error: BaseException) -> str:
    """The error in one line, and below it the last words of the actor of whose death it tells."""
    words = last_words(error)
    return "\n".join([brief(error) + ("; its last words:" if words else ""), *words])


def last_words(error: BaseException) -> list[str]:
    """The last lines on stderr of the actor whose death `error` tells of; none where it was killed without a
    word, or lived on another node."""
    import ray

    pid = re.search(r"\bpid: (\d+)", str(error))
    node = ray._private.worker._global_node
    if pid is None or node is None:
        return []
    for path in Path(node.get_logs_dir_path()).glob(f"worker-*-{pid[1]}.err"):
        lines = path.read_text(errors="replace").splitlines()
        said = [line.rstrip() for line in lines if line.strip() and not line.startswith(":")]  # Ray's own marks
        return said[-LINES:]
    return []
