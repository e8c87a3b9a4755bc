"""Demonstration files to rows of text.

Every bad row is found before anything starts and reported as `file:line: field: problem`. Four
layouts are recognised by their columns; see LAYOUTS.
"""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft_dist.config import DataConfig
from sdft_dist.errors import DataError

Message = dict[str, str]
# (column of the prompt, column of the demonstration), in the order in which they are looked for.
LAYOUTS = (
    ("prompt", "demonstration"),
    ("prompt", "privileged_context"),  # TRL's
    ("messages", "output_text"),  # the paper's
    ("prompt", "golden_response"),  # the paper's
)
FILES = (".jsonl", ".json", ".parquet")
KNOWN = f"known: {', '.join(FILES)}, a saved dataset, a hub id"
ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_REPORTED = 20
_SPACE = re.compile(r"[ \t\r\n]*")  # JSON's


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One demonstration as text."""

    where: str  # file:line, for messages
    messages: tuple[Message, ...]  # the conversation up to the student's turn; the last is the user's
    demonstration: str
    answer: str | None = None  # for evaluation
    imitable: bool = True  # false for a privileged context, which is no answer to imitate

    def record(self) -> dict[str, Any]:
        """A record that reads back as this row."""
        column = "demonstration" if self.imitable else "privileged_context"
        return {"prompt": list(self.messages), column: self.demonstration}


class _BadField(ValueError):
    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


def load_rows(
    source: str,
    *,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
    need_demonstration: bool = True,
    setting: str = "data.train",
) -> list[Row]:
    """All rows of a .jsonl, .json or .parquet file, a folder saved by `datasets`, or a hub id.

    With `need_demonstration` false, a prompt and an `answer` are enough (held-out rows). `setting` is what names
    `source`. Raises DataError that lists every bad row as `file:line: field: problem`, or says what is wrong with
    `setting`.
    """
    rows: list[Row] = []
    problems: list[str] = []
    for where, value in _records(source, split, subset, setting):
        if isinstance(value, _BadField):
            problems.append(f"{where}: {value.field}: {value}")
            continue
        try:
            rows.append(_row(where, value, need_demonstration))
        except _BadField as e:
            problems.append(f"{where}: {e.field}: {e}")
        if limit is not None and len(rows) + len(problems) >= limit:
            break
    if problems:
        raise DataError("\n".join([f"{len(problems)} bad rows", *few(problems)]))
    if not rows:
        raise DataError(f"{setting}: {source}: no rows")
    return rows


def few(problems: Sequence[str]) -> list[str]:
    """As many of them as are for reading, and how many more there are."""
    more = len(problems) - MAX_REPORTED
    return [*problems[:MAX_REPORTED], *([f"… and {more} more"] if more > 0 else [])]


def load_training_rows(data: DataConfig, method: str) -> list[Row]:
    """The rows to train on. Raises DataError; also where `method` imitates rows that cannot be."""
    rows = load_rows(data.train, split=data.split, subset=data.subset, limit=data.limit)
    if method != "sdft":
        for row in rows:
            if not row.imitable:
                raise DataError(
                    f"{row.where}: privileged_context: is a context, not an answer to imitate; "
                    f"method={method} needs a `demonstration` column"
                )
    return rows


def _records(source: str, split: str, subset: str | None, setting: str) -> Iterator[tuple[str, Any]]:
    """(file:line, record or _BadField) of every record."""
    path = Path(source)
    kind = path.suffix.lower()
    if path.is_file():
        if kind not in FILES:
            raise DataError(f"{setting}: {source}: is no file of a known kind ({KNOWN})")
        if path.stat().st_size == 0:
            raise DataError(f"{setting}: {source}: the file is empty")
        if split != "train":
            raise DataError(f"data.split: got {split!r}, but {source} is a file, which has no splits: leave it out")
    elif not path.is_dir() and (kind in FILES or not _may_be_hub_id(source)):
        raise DataError(f"{setting}: {source}: no such file ({KNOWN})")
    if path.is_file() and kind == ".jsonl":
        yield from _json_lines(path)
    elif path.is_file() and kind == ".json":
        yield from _json_array(path)
    else:
        records = _parquet(path, setting) if path.is_file() else _dataset(source, split, subset, setting)
        for i, record in enumerate(records, start=1):
            yield f"{source}:{i}", record


def _may_be_hub_id(source: str) -> bool:
    """Whether it is NAME, or OWNER/NAME, where the name may hold a dot unless a folder here is called OWNER."""
    if source.startswith((".", "/")) or source.count("/") > 1:
        return False
    owner, slash, name = source.rpartition("/")
    return "." not in name or bool(slash and not Path(owner).exists())


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
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as e:
        return _BadField("line", f"not UTF-8 at byte {e.start}")
    except (ValueError, RecursionError) as e:  # a plain ValueError of an integer with too many digits
        return _BadField("line", f"not JSON: {e}")


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of a JSON array with the line on which each begins, up to the first mistake."""
    raw = path.read_bytes().removeprefix(BOM_UTF8)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        yield f"{path}:{line}", _BadField("file", f"not UTF-8 at byte {e.start}")
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
            yield where, _BadField("row", f"not JSON: {e}")
            return
        yield where, record
        at = _skip_space(text, at)
        more = text[at : at + 1] == ","
        if more:
            at = _skip_space(text, at + 1)
    end = _skip_space(text, at + 1)
    if text[at : at + 1] != "]":
        got = repr(text[at]) if at < len(text) else "the end of the file"
        yield _line(path, text, at), _BadField("file", f"got {got} after a row, expected , or ]")
    elif end < len(text):
        yield _line(path, text, end), _BadField("file", f"got {text[end]!r} after ], expected the end of the file")


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # of an empty space, too
    return found.end()


def _line(path: Path, text: str, at: int) -> str:
    return f"{path}:{text.count(chr(10), 0, at) + 1}"


def _row(where: str, record: Any, need_demonstration: bool) -> Row:
    if not isinstance(record, dict):
        raise _BadField("row", f"is a {type(record).__name__}, not an object with columns")
    present = {k for k, v in record.items() if v is not None}
    layout = next((pair for pair in LAYOUTS if present.issuperset(pair)), None)
    answer = next((_answer(c, record[c]) for c in ("answer", "golden_answer") if c in present), None)
    if layout is None:
        prompt_column = next((c for c in ("prompt", "messages") if c in present), None)
        if prompt_column is None or need_demonstration:
            raise _missing(record, present)
        if answer is None:
            raise _BadField("answer", f"is missing, and so is a demonstration; found: {_names(present)}")
        return Row(where=where, messages=_conversation(record, prompt_column), demonstration="", answer=answer)
    prompt_column, column = layout
    demonstration = _demonstration(column, record[column])
    return Row(
        where=where,
        messages=_conversation(record, prompt_column),
        demonstration=demonstration,
        answer=answer,
        imitable=column != "privileged_context",
    )


def _missing(record: dict[str, Any], present: set[str]) -> _BadField:
    found = f"found: {_names(present)}"
    if "prompt" in present:
        return _BadField("demonstration", f"is missing (or `privileged_context`, or `golden_response`); {found}")
    if "messages" in present:
        _conversation(record, "messages")  # whose last message is most often what is missing
        return _BadField("output_text", f"is missing; {found}")
    wanted = " or ".join(f"{a}+{b}" for a, b in LAYOUTS)
    return _BadField("prompt", f"is missing; a row has the columns {wanted}; {found}")


def _names(present: set[str]) -> str:
    text = ", ".join(sorted(present)) or "none"
    return text if len(text) <= 200 else text[:199] + "…"


def _conversation(record: dict[str, Any], column: str) -> tuple[Message, ...]:
    value = record[column]
    if isinstance(value, str):
        value = [{"role": "user", "content": _text(column, value)}]
    messages = _messages(column, value)
    last = messages[-1]["role"]
    if last != "user":
        place = next(answer for prompt, answer in LAYOUTS if prompt == column)
        hint = f"; put the assistant's answer into `{place}`" if last == "assistant" else ""
        raise _BadField(column, f"must end with the user, not the {last}{hint}")
    return messages


def _messages(column: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _BadField(column, f"is {_show(value)}; expected text or a list of messages")
    for i, m in enumerate(value):
        if not isinstance(m, dict) or "role" not in m:
            raise _BadField(f"{column}[{i}]", "is not a message with `role` and `content`")
        if m["role"] not in ROLES:  # the template writes it between control tokens
            raise _BadField(f"{column}[{i}].role", f"is {_show(m['role'])}; expected one of {', '.join(ROLES)}")
        if m.get("tool_calls"):
            raise _BadField(f"{column}[{i}].tool_calls", "is not read: write the calls into `content`, as text")
        _text(f"{column}[{i}].content", m.get("content"))
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


def _demonstration(column: str, value: Any) -> str:
    if column == "golden_response" and isinstance(value, list):
        if not value or not all(isinstance(part, str) for part in value):
            raise _BadField(column, f"is {_show(value)}; expected a list of texts")
        return _text(column, "\n".join(value))
    if isinstance(value, list):
        replies = [m for m in _messages(column, value) if m["role"] == "assistant"]
        if len(replies) != 1:
            raise _BadField(column, f"has {len(replies)} assistant messages; expected one")
        return replies[0]["content"]
    return _text(column, value)


def _text(column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _BadField(column, f"is {_show(value)}; expected text")
    if not value.strip():
        raise _BadField(column, "is empty")
    if "\0" in value:
        raise _BadField(column, "holds a NUL character")
    return _writable(column, value)


def _writable(column: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadField(column, "holds half a surrogate pair, which is no text") from None
    return text


def _answer(column: str, value: Any) -> str:
    """Text as it is, other values as JSON."""
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False)
        except TypeError:  # Parquet has dates, decimals and bytes
            raise _BadField(column, f"is {_show(value)}; expected text, or a value that JSON has") from None
    return _writable(column, value)


def _show(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '…'}"
