"""A demonstration as token ids: the student's view and the teacher's view of one prompt.

Both views end with the same generation prompt, or the completion's first tokens would not be aligned.
Text of a row is text: a control token's name inside it (`<|im_end|>`) is never read as the token.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdft_dist.config import Config, ModelConfig
from sdft_dist.data import Message, Row, few
from sdft_dist.errors import DataError, UserError
from sdft_dist.problems import ProblemSet
from sdft_dist.records import may_be_hub_id
from sdft_dist.types import Problem

BATCH = 1024  # rows that are tokenised at a time
# Templates that tell the day tell this one, to which Llama 3.1's falls back: a run that goes on tomorrow, and the next
# trial of a sweep, have the same rows.
DAY = date(2024, 7, 26)


def load_tokenizer(config: Config) -> Any:
    """The tokenizer of `model.path`, whose `apply_chat_template` gives the template what `prompt` says. Raises
    UserError where tokenizer or template are missing."""
    from transformers import AutoTokenizer

    path = config.model.path
    if not Path(path).is_dir() and not may_be_hub_id(path):
        raise UserError(f"model.path: {path}: no such folder")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        hint = f"; it is a run: use {path}/model" if (Path(path) / "model" / "config.json").is_file() else ""
        raise UserError(f"model.path: {path}: is no Hugging Face folder (no config.json){hint}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=config.model.revision)
    except Exception as e:  # tokenizers raises no other kind for a damaged file
        why = str(e)
        if not Path(path).is_dir():  # of the hub's, which go on for paragraphs, the first line
            place = "" if Path(path).is_absolute() else f" in {Path.cwd()}"
            why = f"there is no such folder{place}, and as a hub id: " + why.partition("\n")[0].rstrip(".")
        raise UserError(f"model.path: {path}: no tokenizer could be loaded: {why}") from e
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
    variables = {"strftime_now": DAY.strftime, **config.prompt.chat_template_kwargs}
    tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, **variables)
    # Marked as said already: what is too long is reported by row, with the limit that counts.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def vocab_size(tokenizer: Any) -> int:
    """One more than its highest id: where ids have gaps, as in conversions of tiktoken's, there are fewer tokens."""
    return max(tokenizer.get_vocab().values()) + 1


def stop_ids(tokenizer: Any, model: ModelConfig) -> list[int]:
    """Token ids that end a completion: the tokenizer's and those of the model's generation settings or, where it has
    none, of its configuration, as transformers and vLLM do. Raises UserError where the model has no such id."""
    from transformers import GenerationConfig, PreTrainedConfig

    ids = {tokenizer.eos_token_id}
    try:
        listed = GenerationConfig.from_pretrained(model.path, revision=model.revision).eos_token_id
    except OSError:
        written, _ = PreTrainedConfig.get_config_dict(model.path, revision=model.revision)
        listed = written.get("eos_token_id")  # as written: classes have defaults of other models
    ids.update([listed] if isinstance(listed, int) else listed or [])
    _refuse_unknown_ids(tokenizer, model, [("the end of a turn", _ids(sorted(ids)))])
    return sorted(ids)


def _refuse_unknown_ids(tokenizer: Any, model: ModelConfig, used: Iterable[tuple[str, np.ndarray]]) -> None:
    """Raises UserError that names each of `used`, as (where, ids [T]), which has an id that the model has no row for:
    a tokenizer may have been given tokens after its model was made. Rows without an id are padding, and fine."""
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(model.path, revision=model.revision)
    except (OSError, ValueError):  # which whoever loads the model tells better
        return
    rows = getattr(settings.get_text_config(), "vocab_size", None) or np.inf
    unknown = [(where, int(ids.max(initial=0))) for where, ids in used if ids.max(initial=0) >= rows]
    if unknown:
        lines = [f"{where}: id {number} ({tokenizer.decode([number])})" for where, number in unknown]
        raise UserError(
            f"model.path: {model.path}: its tokenizer has {vocab_size(tokenizer)} ids, its embeddings have {rows} "
            "rows, and ids without a row are used:\n" + "\n".join(few(lines)) + "\nGive the model more rows "
            "(transformers: resize_token_embeddings), or use the tokenizer that it was trained with."
        )


def teacher_messages(row: Row, template: str) -> tuple[Message, ...]:
    """The row's conversation with the demonstration put into its last user turn."""
    *before, last = row.messages
    shown = fill(template, {"prompt": last["content"], "demonstration": row.demonstration})
    return (*before, {"role": "user", "content": shown})


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with each {name} of `values` replaced, in one pass: braces inside a value stay text."""
    return re.sub(rf"\{{({'|'.join(values)})\}}", lambda m: values[m[1]], template)


def encode_chats(tokenizer: Any, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Token ids of conversations that each end with the generation prompt.

    The template sees each text as it is, as it may look into it (Qwen3's drops what comes before `</think>` in earlier
    turns). Only the names of control tokens are kept from it; they are tokenised by themselves, as plain text."""
    control = _control_names(tokenizer)
    pieces = [list(_pieces(tokenizer, control, messages)) for messages in conversations]
    rendered = iter(_tokenize(tokenizer, [text for one in pieces for text, name in one if not name]))
    names = iter(_tokenize(tokenizer, [text for one in pieces for text, name in one if name], as_text=True))
    return [[id for _, name in one for id in next(names if name else rendered)] for one in pieces]


def _pieces(tokenizer: Any, control: Collection[str], messages: Sequence[Message]) -> Iterator[tuple[str, bool]]:
    """The rendered conversation, in order: text, and whether it is the name of a control token that a message holds."""
    used = [name for name in control if any(name in m["content"] for m in messages)]
    if not used:
        yield _render(tokenizer, messages), False
        return
    names = {_mark(i): name for i, name in enumerate(used)}
    marks = {name: mark for mark, name in names.items()}
    longest_first = "|".join(map(re.escape, sorted(used, key=len, reverse=True)))
    masked = [{**m, "content": re.sub(longest_first, lambda found: marks[found[0]], m["content"])} for m in messages]
    for piece in re.split(f"({'|'.join(names)})", _render(tokenizer, masked)):
        if piece:
            yield names.get(piece, piece), piece in names


def _tokenize(tokenizer: Any, texts: Sequence[str], *, as_text: bool = False) -> list[list[int]]:
    """Token ids of each text; `as_text` reads no name of a control token as the token. The tokenizer's threads share
    the texts of a call."""
    return list(tokenizer(texts, add_special_tokens=False, split_special_tokens=as_text)["input_ids"]) if texts else []


def _control_names(tokenizer: Any) -> set[str]:
    """Of tokens that can forge a turn. Others that were added, such as `</think>`, are words with ids of their own."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return {*map(str, tokenizer.all_special_tokens), *added}


def _mark(i: int) -> str:
    """Stands for a control token's name, or for the end of a text, in what a template makes."""
    return f"\ue000{i}\ue001"


def encode_completions(tokenizer: Any, texts: Sequence[str], end: int) -> list[list[int]]:
    """Token ids of demonstrations as the student would say them, each with the end-of-turn token `end`."""
    return [[*ids, end] for ids in _tokenize(tokenizer, texts, as_text=True)]


def turn_end(tokenizer: Any, model: ModelConfig) -> int:
    """The token with which the student ends its turn: the one that the template writes there, if completions end with
    it, which need not be the tokenizer's (Gemma, Phi-3); otherwise the tokenizer's."""
    try:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _mark(0)}]
        shown = _render(tokenizer, turns, ask=False)
    except UserError:  # a template that knows no answers
        return int(tokenizer.eos_token_id)
    (after,) = _tokenize(tokenizer, [shown.rpartition(_mark(0))[2].lstrip()])
    return next((id for id in after[:1] if id in stop_ids(tokenizer, model)), int(tokenizer.eos_token_id))


def check_views(tokenizer: Any, row: Row, template: str) -> None:
    """Raises UserError unless both views of `row` end with the same generation prompt."""
    endings, mark = [], _mark(0)
    for *before, last in (row.messages, teacher_messages(row, template)):
        shown = _render(tokenizer, [*before, {**last, "content": last["content"] + mark}])
        endings.append(shown.rpartition(mark)[2])
    if endings[0] != endings[1]:
        raise UserError(
            f"chat template: {row.where}: the student's view ends with {endings[0]!r} and the teacher's with "
            f"{endings[1]!r}; completions would not be aligned"
        )


class Encoded(NamedTuple):
    """What became of the rows."""

    problems: ProblemSet
    kept: list[Row]  # those of `problems`, in their order
    dropped: list[str]  # a line for each dropped row: where it is and why
    truncated: list[str]  # the same for each shortened demonstration


def encode_problems(config: Config, tokenizer: Any, rows: Sequence[Row]) -> Encoded:
    """Both views of every row, with `data.too_long` applied to those that do not fit.

    Raises DataError that names each row which does not fit and may not be dropped or shortened, or
    where no row is left; UserError that names each row with an id which the model does not have.
    """
    # A template may take another branch for every sequence of roles, so one row of each is looked at.
    for row in {tuple(m["role"] for m in row.messages): row for row in reversed(rows)}.values():
        check_views(tokenizer, row, config.prompt.template)
    policy, end = config.data.too_long, turn_end(tokenizer, config.model)
    problems: list[Problem] = []
    kept: list[Row] = []
    dropped: list[str] = []
    truncated: list[str] = []
    unfit: list[str] = []
    for row, problem in zip(rows, _encode(config, tokenizer, rows, end), strict=True):
        message = _overlong(config, problem)
        if message is not None and policy == "truncate_demonstration":
            problem = _truncated(config, tokenizer, row, problem)
            if (still := _overlong(config, problem)) is None:
                truncated.append(f"{row.where}: {message}")
            message = still
        if message is None:
            problems.append(problem)
            kept.append(row)
        else:
            (dropped if policy == "drop" else unfit).append(f"{row.where}: {message}")
    if unfit:
        head = "1 row is too long" if len(unfit) == 1 else f"{len(unfit)} rows are too long"
        raise DataError("\n".join([head, *few(unfit), _ADVICE]))
    if not problems:
        raise DataError("\n".join(["data.too_long=drop leaves no row", *few(dropped)]))
    parts = {
        "prompt": "prompt_ids",
        "prompt with its demonstration": "teacher_prompt_ids",
        "demonstration": "demonstration_ids",
    }
    used = (
        (f"{row.where}: {part}", getattr(problem, ids))
        for row, problem in zip(kept, problems, strict=True)
        for part, ids in parts.items()
    )
    _refuse_unknown_ids(tokenizer, config.model, used)
    return Encoded(ProblemSet(problems), kept, dropped, truncated)


_ADVICE = "Raise the limit that is named, or see data.too_long for dropping rows or shortening demonstrations."


def _encode(config: Config, tokenizer: Any, rows: Sequence[Row], end: int) -> Iterator[Problem]:
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        prompts = encode_chats(tokenizer, [row.messages for row in some])
        shown = encode_chats(tokenizer, [teacher_messages(row, config.prompt.template) for row in some])
        said = encode_completions(tokenizer, [row.demonstration for row in some], end)
        for views in zip(prompts, shown, said, strict=True):
            prompt, teacher_prompt, demonstration = map(_ids, views)
            yield Problem(prompt_ids=prompt, teacher_prompt_ids=teacher_prompt, demonstration_ids=demonstration)


def _truncated(config: Config, tokenizer: Any, row: Row, problem: Problem) -> Problem:
    """The problem with its demonstration cut at the end by as many tokens as it is over, and without an end-of-turn
    token, which does not follow there; as it was where nothing of the demonstration would be left."""
    length, end = len(problem.demonstration_ids) - 1, int(problem.demonstration_ids[-1])
    if config.method == "sdft":
        total = len(problem.teacher_prompt_ids) + config.rollout.max_completion_tokens
    else:
        total = len(problem.prompt_ids) + length + 1
    over = max(0, total - config.model.max_length, length - (config.data.max_demonstration_tokens or length))
    # Tokens may merge at the new border, so cut a little more until it fits; three tries are plenty.
    for extra in (0, 4, 16):
        kept = problem.demonstration_ids[: max(0, length - over - extra)]
        text = tokenizer.decode(kept).rstrip("\ufffd")  # of a character that is cut
        if not text.strip():
            break
        (found,) = _encode(config, tokenizer, [replace(row, demonstration=text)], end)
        if _overlong(config, found) is None:
            return replace(found, demonstration_ids=found.demonstration_ids[:-1])
    return problem


def encode_prompts(config: Config, tokenizer: Any, rows: Sequence[Row]) -> list[np.ndarray]:
    """The student's view, int32 [P], of held-out rows. Raises DataError that names each one which leaves no room for
    a whole completion: it would be cut short, and judged by that; UserError that names each one with an id which the
    model does not have."""
    prompts = list(map(_ids, encode_chats(tokenizer, [row.messages for row in rows])))
    (name, room), limit = config.evaluation_limit, config.model.max_length
    unfit = [
        f"{row.where}: prompt of {len(ids)} tokens + {name}={room} is {len(ids) + room}, above model.max_length={limit}"
        for row, ids in zip(rows, prompts, strict=True)
        if len(ids) + room > limit
    ]
    if unfit:
        head = "1 held-out row is too long" if len(unfit) == 1 else f"{len(unfit)} held-out rows are too long"
        advice = f"Raise model.max_length, lower {name}, or leave these rows out."
        raise DataError("\n".join([head, *few(unfit), advice]))
    used = ((f"{row.where}: prompt", ids) for row, ids in zip(rows, prompts, strict=True))
    _refuse_unknown_ids(tokenizer, config.model, used)
    return prompts


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


def _render(tokenizer: Any, messages: Sequence[Message], *, ask: bool = True) -> str:
    """With `ask`, up to where the student's turn begins."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=ask, tokenize=False))
    except Exception as e:  # a template is code of the model folder's, which may fail in any way
        raise UserError(f"chat template: fails on roles {[m['role'] for m in messages]}: {e}") from e


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"prompt.chat_template: {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"prompt.chat_template: {path}: not UTF-8 at byte {e.start}") from e


def _ids(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)
