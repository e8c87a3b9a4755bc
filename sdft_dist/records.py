"""Files, saved data sets and hub ids to records, each with where it is: nothing is known here of their columns."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdft_dist.errors import DataError

FILES = (".jsonl", ".json", ".parquet")
KNOWN = f"known: {', '.join(FILES)}, a saved dataset, a hub id"
_SPACE = re.compile(r"[ \t\r\n]*")  # JSON's


class BadField(ValueError):
    """What is wrong with one field of a record."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


def records_of(source: str, split: str, subset: str | None, setting: str) -> Iterator[tuple[str, Any]]:
    """(file:line, record or BadField) of every record of a file, a saved data set or a hub id. Raises DataError, which
    names the `setting`, where it cannot be read at all."""
    path = Path(source)
    kind = path.suffix.lower()
    if path.is_file():
        if kind not in FILES:
            raise DataError(f"{setting}: {source}: is no file of a known kind ({KNOWN})")
        if path.stat().st_size == 0:
            raise DataError(f"{setting}: {source}: the file is empty")
        if split != "train":
            raise DataError(f"data.split: got {split!r}, but {source} is a file, which has no splits: leave it out")
    elif not path.is_dir() and (kind in FILES or _is_a_files_name(source) or not may_be_hub_id(source)):
        place = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise DataError(f"{setting}: {source}: no such file{place} ({KNOWN})")
    if path.is_file() and kind == ".jsonl":
        yield from _json_lines(path)
    elif path.is_file() and kind == ".json":
        yield from _json_array(path)
    else:
        records = _parquet(path, setting) if path.is_file() else _dataset(source, split, subset, setting)
        for i, record in enumerate(records, start=1):
            yield f"{source}:{i}", record


def may_be_hub_id(text: str) -> bool:
    """Whether it reads as NAME or OWNER/NAME, as ids of the hub do."""
    return not text.startswith((".", "/")) and text.count("/") <= 1


def _is_a_files_name(source: str) -> bool:
    """Whether its last part has a dot, as in `none.csv` and `data/none.csv`. OWNER/NAME-2.5 is no file's name where no
    folder here is called OWNER."""
    owner, slash, name = source.rpartition("/")
    return "." in name and (not slash or Path(owner).exists())


def _parquet(path: Path, setting: str) -> Iterator[Any]:
    """Records of one file. Read by pyarrow itself: `datasets` takes a path for a pattern, and answers from a cache."""
    from pyarrow.parquet import ParquetFile

    try:
        with path.open("rb") as file:
            for batch in ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
    except Exception as e:  # pyarrow raises many kinds for a bad file
        raise DataError(f"{setting}: {path}: could not be read: {type(e).__name__}: {e}") from e


def _dataset(source: str, split: str, subset: str | None, setting: str) -> Any:
    import datasets

    path = Path(source)
    try:
        found = datasets.load_from_disk(source) if path.is_dir() else datasets.load_dataset(source, subset)
    except Exception as e:  # datasets raises many kinds for a bad file or an unreachable hub
        what = "could not be read" if path.exists() else "no such file, and no data set of the hub could be read"
        raise DataError(f"{setting}: {source}: {what}: {type(e).__name__}: {e}") from e
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            where = "data.split" if setting == "data.train" else setting
            raise DataError(f"{where}: {source} has no split {split!r}; it has {', '.join(found)}")
        return found[split]
    # A saved split knows its own name.
    if split != "train" and split != str(found.split or ""):
        raise DataError(f"data.split: got {split!r}, but {source} is one data set, which has no splits: leave it out")
    return found


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(BOM_UTF8)
                if raw.lstrip().startswith(b"["):
                    raise DataError(f"{path}:1: file: a .jsonl holds one object a line; for an array use .json")
            if raw.strip():
                yield f"{path}:{number}", _parse(raw)


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8").rstrip("\n"))
    except UnicodeDecodeError as e:
        return BadField("line", f"not UTF-8 at byte {e.start}")
    except json.JSONDecodeError as e:
        return BadField("line", f"not JSON: {e.msg}: character {e.pos + 1}")
    except (ValueError, RecursionError) as e:  # a plain ValueError of an integer with too many digits
        return BadField("line", f"not JSON: {e}")


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of a JSON array with the line on which each begins, up to the first mistake."""
    raw = path.read_bytes().removeprefix(BOM_UTF8)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        yield f"{path}:{line}", BadField("file", f"not UTF-8 at byte {e.start}")
        return
    at = _skip_space(text, 0)
    if text[at : at + 1] != "[":
        raise DataError(f"{path}:1: file: a .json file holds an array of rows; for one row a line use .jsonl")
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = _skip_space(text, at + 1)
    more = text[at : at + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}"
        try:
            record, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            yield where, BadField("row", f"not JSON: {e}")
            return
        yield where, record
        at = _skip_space(text, at)
        more = text[at : at + 1] == ","
        if more:
            at = _skip_space(text, at + 1)
    end = _skip_space(text, at + 1)
    if text[at : at + 1] != "]":
        got = repr(text[at]) if at < len(text) else "the end of the file"
        yield _line(path, text, at), BadField("file", f"got {got} after a row, expected , or ]")
    elif end < len(text):
        yield _line(path, text, end), BadField("file", f"got {text[end]!r} after ], expected the end of the file")


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # of an empty space, too
    return found.end()


def _line(path: Path, text: str, at: int) -> str:
    return f"{path}:{text.count(chr(10), 0, at) + 1}"
