"""A timeline of all actors in Chrome's trace format, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import json
from pathlib import Path

from sdft_dist.types import Span


class Trace:
    """Written event by event, so that memory stays flat and a killed run leaves a file that opens: the
    format allows the closing bracket to be missing. One process per role, one thread per actor."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")
        self._file.write("[\n")
        self._roles: dict[str, int] = {}

    def add(self, role: str, index: int, span: Span) -> None:
        """One bar of the timeline."""
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
        self._file.write(json.dumps(event) + ",\n")
