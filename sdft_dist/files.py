"""Files that commands write and read back: JSON lines, whole files, folders for results.

A line of JSON ends at \\n alone: completions hold U+2028, U+0085 and whatever else str.splitlines takes for an end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
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


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]], default: Callable[[Any], Any] | None = None) -> None:
    """Write each as a line, and the file's folders; `default` makes something of what JSON does not know."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False, default=default) + "\n" for record in records)


def write_whole(path: Path, text: str) -> None:
    """Write a file, and its folders, so that a reader or a kill finds it whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text)
    beside.replace(path)


def refuse_used(out: Path) -> None:
    """Raises UserError where `--out` is no unused folder, or none can be made there: results are written at the end."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} is already in use: give another, or remove it")
    place = unwritable(out)
    if place is not None:
        raise UserError(f"--out: {out}: nothing can be written to {place}: give another")


def unwritable(path: Path) -> Path | None:
    """What keeps a file or folder from being written at `path`: `path` itself, or the nearest folder above it that
    exists. None where nothing does."""
    place = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    fit = (place == path.absolute() or place.is_dir()) and os.access(place, os.W_OK)
    return None if fit else place
