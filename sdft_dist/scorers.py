"""Whether a completion is right: for `eval.scorer`, as `sdft_dist.scorers:letter` and so on.

Each takes the completion and the row's answer as text. What they accept is written down here, since
figures of accuracy cannot be compared otherwise.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

_TAGGED = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.IGNORECASE | re.DOTALL)
_LETTER = re.compile(r"\W*([A-Z])(?:\W.*)?", re.DOTALL)
_SAID = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s+(?:letter|option|choice))?\s*(?:is|:|=)?\s*(?:option|choice)?[\s:*_({\[\"'`]*"
    r"\b([A-Z])\b(?![\w'])",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*([A-Z])\b")
_CALL = re.compile(r"^[ \t]*Action:[ \t]*(.*?)[ \t]*\n+[ \t]*Action[ _]Input:\s*", re.MULTILINE)


def text(completion: str, answer: str) -> bool:
    """The same but for case, Unicode form, runs of white space, and punctuation at the ends."""
    return _plain(completion) == _plain(answer)


def letter(completion: str, answer: str) -> bool:
    """A multiple-choice letter: that of the last <answer> tags; where there are none, of the last \\boxed{},
    of the last "answer is X" or "option X", or a completion that is nothing but the letter."""
    return chosen_letter(completion) == answer.strip().upper()


def chosen_letter(completion: str) -> str | None:
    """The letter that `letter` compares, or None where the completion names none."""
    tagged = _TAGGED.findall(completion)
    if tagged:
        found = _LETTER.fullmatch(tagged[-1].upper()) or None
        return found.group(1) if found else None
    for pattern in (_BOXED, _SAID):
        named = [match for match in pattern.findall(completion) if match.isupper()]
        if named:
            return str(named[-1])
    alone = re.fullmatch(r"\W*([A-Z])\W*", completion.strip())
    return alone.group(1) if alone else None


def tool_calls(completion: str, answer: str) -> bool:
    """The calls of the answer, no more and no fewer, in its order. A call is `Action: NAME` and, below it,
    `Action Input: JSON`; the order of arguments does not matter, 1 and 1.0 are equal, 1 and "1" are not. Input
    that is no JSON is equal to none. `answer` is a list of {"Action", "Action_Input"} as JSON, or such text."""
    found = calls(completion)
    return bool(found) and found == _expected(answer)


def calls(completion: str) -> list[tuple[str, Any]]:
    """Name and input of each call; an input that is no JSON object comes as `Malformed`."""
    out, decoder = [], json.JSONDecoder()
    for match in _CALL.finditer(completion):
        try:
            value, _ = decoder.raw_decode(completion, match.end())
        except ValueError:
            value = Malformed()
        out.append((match.group(1), _typed(value)))
    return out


class Malformed:
    """Equal to nothing, itself included."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


def _expected(answer: str) -> list[tuple[str, Any]]:
    try:
        parsed = json.loads(answer)
    except ValueError:
        return calls(answer)
    return [(call["Action"], _typed(json.loads(call["Action_Input"]))) for call in parsed]


def _typed(value: Any) -> Any:
    """The same value with booleans told from 0 and 1, which Python takes for equal."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, list):
        return [_typed(v) for v in value]
    if isinstance(value, dict):
        return {k: _typed(v) for k, v in value.items()}
    return value


def _plain(value: str) -> str:
    words = unicodedata.normalize("NFKC", value).casefold().split()
    return " ".join(words).strip(" .,;:!?\"'`*")
