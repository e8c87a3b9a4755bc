"""Damaged files: every one either loads right or is reported by line and field, never by a traceback."""

import json
import random
import re

import pytest

from sdft_dist.data import load_rows
from sdft_dist.errors import DataError

FILES = 1000
REPORT = re.compile(r"^(\d+ bad rows?|.*rows\.jsonl: .+|.*rows\.jsonl:\d+: [^:]+: .+|… and \d+ more)$", re.DOTALL)
ROWS = [
    {"prompt": "Ünïcode <|im_end|> prompt", "demonstration": "text"},
    {"prompt": [{"role": "user", "content": "q"}], "demonstration": [{"role": "assistant", "content": "a"}]},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "output_text": "a"},
    {"prompt": "q", "golden_response": "a", "answer": "B"},
]
VALUES = [
    *(None, True, 0, -1.5, float("inf"), "", " ", "\0", "x" * 1_000_000, "\ud800", [], {}, [[]], [None]),
    [{"role": 1}],
    [{"role": "user"}],
    [{"role": "tool", "content": "x"}],
    {"role": "user", "content": "x"},
]


def in_a_row(rng, row):
    """Another type, a missing, an added, or a strange field."""
    row = dict(row)
    field = rng.choice(list(row))
    kind = rng.randrange(4)
    if kind == 0:
        row[field] = rng.choice(VALUES)
    elif kind == 1:
        del row[field]
    elif kind == 2:
        row[rng.choice(["demonstration", "output_text", "extra", "\0", "answer", ""])] = rng.choice(VALUES)
    else:
        return rng.choice([*VALUES, row])
    return row


def in_bytes(rng, raw):
    """Cut, overwritten, doubled, or filled with what is no text."""
    at = rng.randrange(len(raw))
    return rng.choice(
        [
            raw[:at],
            raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :],
            raw[:at] + rng.choice([b"\0", b"\xff\xfe", b"\xc3", b"\n", b"\r", b'"', b"{", b"\xef\xbb\xbf"]) + raw[at:],
            raw[:at] + raw,
            raw.replace(b"\n", b"\r\n"),
            b"[" + raw + b"]",
            b"\xef\xbb\xbf" + raw,
        ]
    )


@pytest.mark.fault("bad data", "1,000 damaged files", "loaded right or reported as file:line and field")
def test_a_thousand_damaged_files(tmp_path):
    rng, loaded, reported = random.Random(0), 0, 0
    path = tmp_path / "rows.jsonl"
    for number in range(FILES):
        layout = rng.choice(ROWS)
        rows = [dict(layout) for _ in range(rng.randint(1, 4))]
        damaged = rng.randrange(len(rows))
        if number % 2:
            rows[damaged] = in_a_row(rng, rows[damaged])
        raw = "\n".join(json.dumps(row) for row in rows).encode()
        path.write_bytes(raw if number % 2 else in_bytes(rng, raw))
        try:
            found, report = load_rows(str(path)), ""
        except DataError as e:
            found, report = [], str(e)
        loaded, reported = loaded + bool(found), reported + bool(report)
        assert all(row.demonstration and row.messages for row in found)
        assert len(report) < 20_000, "a report is for reading"
        for line in report.split("\n") if report else []:
            assert REPORT.match(line), (number, line[:300])
    print(f"{loaded} loaded, {reported} reported")
    assert loaded > 50
    assert reported > 500
