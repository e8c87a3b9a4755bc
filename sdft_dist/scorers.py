"""Whether a completion is right: for `eval.scorer`, as `sdft_dist.scorers:letter` and so on.

Each takes the completion and the row's answer as text. What they accept is written down here, since
figures of accuracy cannot be compared otherwise. A completion can only be wrong, whatever it holds; an
answer that no completion could match is refused when rows are loaded, by the scorer's `NAME_answer`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

# No two parts beside each other may both match spaces: with thousands of them every split would be tried.
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
_LETTER = re.compile(r"\W*([A-Z])(?:\W.*)?", re.DOTALL)
_SAID = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s+(?:letter|option|choice))?\s*(?:is|:|=)?\s*(?:option|choice)?[\s:*_({\[\"'`]*"
    r"\b([A-Z])\b(?![\w'])",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*([A-Z])\b")
_CALL = re.compile(r"^[ \t]*Action:(.*)\n+[ \t]*Action[ _]Input:\s*", re.MULTILINE)
_CALLS = 'a list of {"Action": NAME, "Action_Input": JSON}, or lines of `Action: NAME` and `Action Input: JSON`'


def text(completion: str, answer: str) -> bool:
    """The same but for case, Unicode form, runs of white space, and punctuation at the ends."""
    return _plain(completion) == _plain(answer)


def letter(completion: str, answer: str) -> bool:
    """A multiple-choice letter: that of the last <answer> tags; where there are none, of the last \\boxed{},
    of the last "answer is X" or "option X", or a completion that is nothing but the letter. Raises ValueError
    where the answer is no letter."""
    return chosen_letter(completion) == letter_answer(answer)


def letter_answer(answer: str) -> str:
    """The letter that `letter` looks for, as a capital. Raises ValueError where the answer is not one of A to Z, of
    either case and but for white space around it."""
    if not re.fullmatch(r"[A-Za-z]", answer.strip()):
        raise ValueError(f"is {answer[:60]!r}; expected one letter, A to Z")
    return answer.strip().upper()


def chosen_letter(completion: str) -> str | None:
    """The letter that `letter` compares, or None where the completion names none."""
    tagged = _TAGGED.findall(completion)
    if tagged:
        found = _LETTER.fullmatch(tagged[-1].strip().upper())
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
    that is no JSON is equal to none. `answer` is a list of {"Action", "Action_Input"} as JSON, or such text. Raises
    ValueError where it is neither."""
    expected = tool_calls_answer(answer)
    try:
        return calls(completion) == expected
    except RecursionError:  # both are nested deeply
        return False


def tool_calls_answer(answer: str) -> list[tuple[str, Any]]:
    """The calls that `tool_calls` looks for. Raises ValueError where there are none, or one is malformed."""
    try:
        parsed = json.loads(answer)
    except (ValueError, RecursionError):
        found = calls(answer)
    else:
        found = [_call(call) for call in parsed] if isinstance(parsed, list) else []
    if not found or any(isinstance(value, Malformed) for _, value in found):
        raise ValueError(f"is {answer[:60]!r}; expected {_CALLS}")
    return found


def calls(completion: str) -> list[tuple[str, Any]]:
    """Name and input of each call; an input that is no JSON object comes as `Malformed`."""
    out, decoder = [], json.JSONDecoder()
    for match in _CALL.finditer(completion):
        try:
            value = _typed(decoder.raw_decode(completion, match.end())[0])
        except (ValueError, RecursionError):
            value = Malformed()
        out.append((match.group(1).strip(" \t"), value))
    return out


class Malformed:
    """Equal to nothing else; answers, which a completion is compared with, hold none."""


def _call(call: Any) -> tuple[str, Any]:
    """One of an answer's list; its input may also be there as an object instead of as text."""
    try:
        name, value = call["Action"], call["Action_Input"]
        value = _typed(json.loads(value) if isinstance(value, str) else value)
    except (LookupError, TypeError, ValueError, RecursionError):
        return "", Malformed()
    return (name, value) if isinstance(name, str) else ("", Malformed())


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
