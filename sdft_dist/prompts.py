"""A demonstration as token ids: the student's view and the teacher's view of one prompt.

Both views end with the same generation prompt, or the completion's first tokens would not be aligned.
Text of a row is text: a control token's name inside it (`<|im_end|>`) is never read as the token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdft_dist.config import Config
from sdft_dist.data import Message, ProblemSet, Row
from sdft_dist.errors import DataError, UserError
from sdft_dist.types import Problem


def load_tokenizer(config: Config) -> Any:
    """The tokenizer of `model.path`, with a chat template. Raises UserError where either is missing."""
    from transformers import AutoTokenizer

    path = config.model.path
    if (path.startswith((".", "/")) or path.count("/") > 1) and not Path(path).is_dir():  # a hub id has one slash
        raise UserError(f"model.path: {path}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=config.model.revision)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"model.path: {path}: no tokenizer could be loaded: {e}") from e
    if not len(tokenizer):
        raise UserError(f"model.path: {path}: the folder has no tokenizer")
    if config.prompt.chat_template is not None:
        tokenizer.chat_template = _read_template(config.prompt.chat_template)
    if not tokenizer.chat_template:
        raise UserError(
            f"model.path: the tokenizer of {path} has no chat template: give one with prompt.chat_template=FILE"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path: the tokenizer of {path} has no end-of-turn (eos) token")
    return tokenizer


def stop_ids(tokenizer: Any, model_path: str, revision: str | None = None) -> list[int]:
    """Token ids that end a completion: the tokenizer's and those of the model's generation settings."""
    from transformers import GenerationConfig

    ids = {tokenizer.eos_token_id}
    try:
        listed = GenerationConfig.from_pretrained(model_path, revision=revision).eos_token_id
    except OSError:
        listed = None
    ids.update([listed] if isinstance(listed, int) else listed or [])
    return sorted(ids)


def teacher_messages(row: Row, template: str) -> tuple[Message, ...]:
    """The row's conversation with the demonstration put into its last user turn."""
    *before, last = row.messages
    filling = {"{prompt}": last["content"], "{demonstration}": row.demonstration}
    shown = re.sub(r"\{prompt\}|\{demonstration\}", lambda m: filling[m.group()], template)
    return (*before, {"role": "user", "content": shown})


def encode_chat(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation that ends with the generation prompt."""
    control = [str(t) for t in tokenizer.get_added_vocab()]
    if any(token in m["content"] for m in messages for token in control):
        return _encode_guarded(tokenizer, messages)
    text = _render(tokenizer, messages)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode_guarded(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """As `encode_chat`, where a content holds a control token's name: contents are tokenised apart
    from the template, as plain text."""
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
    masked = [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)]
    pieces = re.split("(\ue000[0-9]+\ue001)", _render(tokenizer, masked))
    ids: list[int] = []
    for piece in pieces:
        if piece in marks:
            content = messages[marks.index(piece)]["content"]
            ids += tokenizer(content, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        elif piece:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


def encode_completion(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a demonstration as the student would say it, with the end-of-turn token."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def check_views(tokenizer: Any, row: Row, template: str) -> None:
    """Raises UserError unless both views of `row` end with the same generation prompt."""
    views = (row.messages, teacher_messages(row, template))
    endings = []
    for messages in views:
        opened = _render(tokenizer, messages)
        closed = _render(tokenizer, messages, generation_prompt=False)
        endings.append(opened[len(closed) :] if opened.startswith(closed) else opened)
    if endings[0] != endings[1]:
        raise UserError(
            f"chat template: the student's view ends with {endings[0]!r} and the teacher's with {endings[1]!r}; "
            "completions would not be aligned"
        )


class Encoded(NamedTuple):
    """What became of the rows."""

    problems: ProblemSet
    dropped: list[str]  # a line for each dropped row: where it is and why
    truncated: list[str]  # the same for each shortened demonstration


def encode_problems(config: Config, tokenizer: Any, rows: Sequence[Row]) -> Encoded:
    """Both views of every row, with `data.too_long` applied to those that do not fit.

    Raises DataError that names each row which does not fit and may not be dropped or shortened, or
    where no row is left.
    """
    check_views(tokenizer, rows[0], config.prompt.template)
    policy = config.data.too_long
    problems: list[Problem] = []
    dropped: list[str] = []
    truncated: list[str] = []
    unfit: list[str] = []
    for row in rows:
        problem = _encode(config, tokenizer, row)
        message = _overlong(config, problem)
        if message is not None and policy == "truncate_demonstration":
            problem = _truncated(config, tokenizer, row, problem)
            if (still := _overlong(config, problem)) is None:
                truncated.append(f"{row.where}: {message}")
            message = still
        if message is None:
            problems.append(problem)
        else:
            (dropped if policy == "drop" else unfit).append(f"{row.where}: {message}")
    if unfit:
        raise DataError("\n".join([f"{len(unfit)} rows are too long", *_few(unfit), _ADVICE]))
    if not problems:
        raise DataError("\n".join(["data.too_long=drop leaves no row", *_few(dropped)]))
    return Encoded(ProblemSet(problems), dropped, truncated)


_ADVICE = "Raise model.max_length, or see data.too_long for dropping rows or shortening demonstrations."


def _few(lines: list[str], most: int = 20) -> list[str]:
    return [*lines[:most], *([f"… and {len(lines) - most} more"] if len(lines) > most else [])]


def _encode(config: Config, tokenizer: Any, row: Row) -> Problem:
    return Problem(
        prompt_ids=_ids(encode_chat(tokenizer, row.messages)),
        teacher_prompt_ids=_ids(encode_chat(tokenizer, teacher_messages(row, config.prompt.template))),
        demonstration_ids=_ids(encode_completion(tokenizer, row.demonstration)),
    )


def _truncated(config: Config, tokenizer: Any, row: Row, problem: Problem) -> Problem:
    """The problem with its demonstration cut at the end by as many tokens as it is over."""
    length = len(problem.demonstration_ids) - 1
    if config.method == "sdft":
        total = len(problem.teacher_prompt_ids) + config.rollout.max_completion_tokens
    else:
        total = len(problem.prompt_ids) + length + 1
    over = max(0, total - config.model.max_length, length - (config.data.max_demonstration_tokens or length))
    # Tokens may merge at the new border, so cut a little more until it fits; three tries are plenty.
    for extra in (0, 4, 16):
        kept = problem.demonstration_ids[: max(0, length - over - extra)]
        shorter = replace(row, demonstration=tokenizer.decode(kept))
        found = _encode(config, tokenizer, shorter)
        if _overlong(config, found) is None:
            return found
    return problem


def encode_prompts(tokenizer: Any, rows: Sequence[Row]) -> list[np.ndarray]:
    """The student's view, int32 [P], of held-out rows."""
    return [_ids(encode_chat(tokenizer, row.messages)) for row in rows]


def _overlong(config: Config, problem: Problem) -> str | None:
    """What is too long about a problem, with the lengths and the limit; None where it fits."""
    data, limit = config.data, config.model.max_length
    prompt, demonstration = len(problem.prompt_ids), len(problem.demonstration_ids)
    if prompt > (data.max_prompt_tokens or prompt):
        return f"prompt of {prompt} tokens is above data.max_prompt_tokens={data.max_prompt_tokens}"
    if demonstration - 1 > (data.max_demonstration_tokens or demonstration):
        most = data.max_demonstration_tokens
        return f"demonstration of {demonstration - 1} tokens is above data.max_demonstration_tokens={most}"
    if config.method == "sdft":
        teacher, room = len(problem.teacher_prompt_ids), config.rollout.max_completion_tokens
        what, total = f"teacher prompt of {teacher} tokens + rollout.max_completion_tokens={room}", teacher + room
        total = max(total, prompt + room)
    else:
        what, total = f"prompt of {prompt} tokens + demonstration of {demonstration}", prompt + demonstration
    return f"{what} is {total}, above model.max_length={limit}" if total > limit else None


def _render(tokenizer: Any, messages: Sequence[Message], generation_prompt: bool = True) -> str:
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(list(messages), add_generation_prompt=generation_prompt, tokenize=False)
        )
    except (TemplateError, TypeError, ValueError) as e:
        raise UserError(f"chat template: fails on roles {[m['role'] for m in messages]}: {e}") from e


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as e:
        raise UserError(f"prompt.chat_template: {path}: {e.strerror}") from e


def _ids(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)
