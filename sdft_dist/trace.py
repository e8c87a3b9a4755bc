"""A timeline of all actors in Chrome's trace format, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import json
from pathlib import Path

from sdft_dist.types import Span

MOST_BYTES = 256 << 20  # hours of a run; a viewer opens not much more


class Trace:
    """Written event by event, so that memory stays flat and a killed run leaves a file that opens: the
    format allows the closing bracket to be missing. One process per role, one thread per actor. After `most_bytes` it
    holds no more."""

    def __init__(self, path: Path, most_bytes: int = MOST_BYTES) -> None:
        self._left = most_bytes
        self._file = path.open("w")
        self._file.write("[\n")
        self._roles: dict[str, int] = {}

    def add(self, role: str, index: int, span: Span) -> None:
        """One bar of the timeline, if there is room."""
        if self._left <= 0:
            return
        if role not in self._roles:
            self._roles[role] = len(self._roles)
            self._write({"name": "process_name", "ph": "M", "pid": self._roles[role], "args": {"name": role}})
        start, duration = round(span.start * 1e6), round((span.end - span.start) * 1e6)
        event = {"name": span.what, "ph": "X", "pid": self._roles[role], "tid": index, "ts": start, "dur": duration}
        self._write(event)

    def close(self) -> None:
        """Complete the file."""
        self._file.write("{}]\n")
        self._file.close()

    def _write(self, event: dict[str, object]) -> None:
        line = json.dumps(event) + ",\n"
        self._left -= len(line)
        self._file.write(line)
