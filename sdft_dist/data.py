"""Records of demonstrations to rows of text.

Every bad row is found before anything starts and reported as `file:line: field: problem`. Four
layouts are recognised by their columns; see LAYOUTS.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sdft_dist.config import DataConfig
from sdft_dist.errors import DataError
from sdft_dist.records import BadField, records_of

Message = dict[str, str]
# (column of the prompt, column of the demonstration), in the order in which they are looked for.
LAYOUTS = (
    ("prompt", "demonstration"),
    ("prompt", "privileged_context"),  # TRL's
    ("messages", "output_text"),  # the paper's
    ("prompt", "golden_response"),  # the paper's
)
ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_REPORTED = 20
LINE = re.compile(r"(.+?):(\d+): (.*)", re.S)  # file, line and what is wrong there


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
    for where, value in records_of(source, split, subset, setting):
        if isinstance(value, BadField):
            problems.append(f"{where}: {value.field}: {value}")
            continue
        try:
            rows.append(_row(where, value, need_demonstration))
        except BadField as e:
            problems.append(f"{where}: {e.field}: {e}")
        if limit is not None and len(rows) + len(problems) >= limit:
            break
    if problems:
        raise DataError("\n".join(["1 bad row" if len(problems) == 1 else f"{len(problems)} bad rows", *few(problems)]))
    if not rows:
        raise DataError(f"{setting}: {source}: no rows")
    return rows


def few(problems: Sequence[str]) -> list[str]:
    """The first MAX_REPORTED, and how many more there are. A problem that three or more lines in a row have is reported
    once for all of them."""
    folded: list[tuple[str, int]] = []  # text, and how many it tells of
    for _, numbered in groupby(enumerate(problems), key=lambda one: _run_of_lines(*one)):
        same = [problem for _, problem in numbered]
        ends = [LINE.fullmatch(same[i]) for i in (0, -1)]
        if len(same) > 2 and ends[0] and ends[1]:
            folded.append((f"{ends[0][1]}:{ends[0][2]} to {ends[1][2]}: {ends[0][3]}", len(same)))
        else:
            folded += [(problem, 1) for problem in same]
    more = sum(number for _, number in folded[MAX_REPORTED:])
    return [*(text for text, _ in folded[:MAX_REPORTED]), *([f"… and {more} more"] if more else [])]


def _run_of_lines(i: int, problem: str) -> tuple[Any, ...]:
    """A key that problem `i` shares with the one before it, where that is the same problem in the line before."""
    found = LINE.fullmatch(problem)
    return (found[1], found[3], int(found[2]) - i) if found else (i,)


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


def _row(where: str, record: Any, need_demonstration: bool) -> Row:
    if not isinstance(record, dict):
        raise BadField("row", f"is a {type(record).__name__}, not an object with columns")
    present = {k for k, v in record.items() if v is not None}
    layout = next((pair for pair in LAYOUTS if present.issuperset(pair)), None)
    answer = next((_answer(c, record[c]) for c in ("answer", "golden_answer") if c in present), None)
    if layout is None:
        prompt_column = next((c for c in ("prompt", "messages") if c in present), None)
        if prompt_column is None or need_demonstration:
            raise _missing(record, present)
        if answer is None:
            raise BadField("answer", f"is missing, and so is a demonstration; found: {_names(present)}")
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


def _missing(record: dict[str, Any], present: set[str]) -> BadField:
    found = f"found: {_names(present)}"
    if "prompt" in present:
        return BadField("demonstration", f"is missing (or `privileged_context`, or `golden_response`); {found}")
    if "messages" in present:
        _conversation(record, "messages")  # whose last message is most often what is missing
        return BadField("output_text", f"is missing; {found}")
    wanted = " or ".join(f"{a}+{b}" for a, b in LAYOUTS)
    return BadField("prompt", f"is missing; a row has the columns {wanted}; {found}")


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
        raise BadField(column, f"must end with the user, not the {last}{hint}")
    return messages


def _messages(column: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise BadField(column, f"is {_show(value)}; expected text or a list of messages")
    for i, m in enumerate(value):
        if not isinstance(m, dict) or "role" not in m:
            raise BadField(f"{column}[{i}]", "is not a message with `role` and `content`")
        if m["role"] not in ROLES:  # the template writes it between control tokens
            raise BadField(f"{column}[{i}].role", f"is {_show(m['role'])}; expected one of {', '.join(ROLES)}")
        if m.get("tool_calls"):
            raise BadField(f"{column}[{i}].tool_calls", "is not read: write the calls into `content`, as text")
        if "content" not in m:
            raise BadField(f"{column}[{i}].content", f"is missing; found: {_names(set(m))}")
        _text(f"{column}[{i}].content", m["content"])
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


def _demonstration(column: str, value: Any) -> str:
    if column == "golden_response" and isinstance(value, list):
        if not value or not all(isinstance(part, str) for part in value):
            raise BadField(column, f"is {_show(value)}; expected a list of texts")
        return _text(column, "\n".join(value))
    if isinstance(value, list):
        replies = [m for m in _messages(column, value) if m["role"] == "assistant"]
        if len(replies) != 1:
            raise BadField(column, f"has {len(replies)} assistant messages; expected one")
        return replies[0]["content"]
    return _text(column, value)


def _text(column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadField(column, f"is {_show(value)}; expected text")
    if not value.strip():
        raise BadField(column, "is empty")
    if "\0" in value:
        raise BadField(column, "holds a NUL character")
    return _writable(column, value)


def _writable(column: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadField(column, "holds half a surrogate pair, which is no text") from None
    return text


def _answer(column: str, value: Any) -> str:
    """Text as it is, other values as JSON."""
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False)
        except TypeError:  # Parquet has dates, decimals and bytes
            raise BadField(column, f"is {_show(value)}; expected text, or a value that JSON has") from None
    return _writable(column, value)


def _show(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '…'}"
