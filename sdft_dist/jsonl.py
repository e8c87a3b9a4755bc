"""Files of JSON lines that runs write and read back: metrics, judged rows, verdicts.

A line ends at \\n alone: completions hold U+2028, U+0085 and whatever else str.splitlines takes for an end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdft_dist.errors import UserError


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, without a last line that is still being written or was cut by a kill; none where there is
    no file. Raises UserError where another one is damaged."""
    records: list[dict[str, Any]] = []
    if not path.is_file():
        return records
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}:{number}: is damaged: {e}; remove this line to leave it out") from e
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: is damaged: no JSON object; remove this line to leave it out")
        records.append(record)
    return records
