"""lm-evaluation-harness on this project's generators: what a model could do before, and can still do.

Needs the extra `eval`. Task versions, prompts and settings are written beside the scores, because a score
without them cannot be compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from lm_eval import evaluator, utils
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from rich.console import Console
from rich.table import Table

from sdft_dist.cluster import serving
from sdft_dist.config import Config
from sdft_dist.errors import UserError, brief
from sdft_dist.files import write_jsonl
from sdft_dist.prompts import load_tokenizer, stop_ids
from sdft_dist.session import ray_session

# The paper names six benchmarks and no settings. These are the harness's own, without examples in the prompt.
PAPER = {
    "hellaswag": 1.0,
    "humaneval_sandboxed": 1.0,
    "ifeval": 4.0,
    "mmlu": 2,
    "truthfulqa_mc2": 3.0,
    "winogrande": 1.0,
}
OWN_TASKS = Path(__file__).parent / "tasks"
FIRST_TOKENS = 32  # generated before stop strings are looked for; then twice as many, and so on


class Engines(Protocol):
    """What the harness needs of the generators."""

    def complete(self, prompts: Sequence[np.ndarray], max_tokens: int) -> list[np.ndarray]: ...
    def loglikelihoods(self, sequences: Sequence[np.ndarray], starts: Sequence[int]) -> list[tuple[float, bool]]: ...


class HarnessModel(TemplateLM):
    """The harness's view of generators; prompts that do not fit `max_length` lose their beginning, as in the
    harness's own models. `ends` are the token ids that end a completion in the engines."""

    def __init__(self, engines: Engines, tokenizer: Any, max_length: int, ends: Collection[int]):
        super().__init__()
        self._engines, self.tokenizer, self._max_length, self._ends = engines, tokenizer, max_length, ends

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that is scored from its first token on."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; the tokenizer's own special tokens unless the text has them or `add_special_tokens` says no."""
        begin = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (begin and string.startswith(begin))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as one text."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        sequences, starts = [], []
        for _text, context, continuation in requests:
            # One token is generated besides, which vLLM cannot do without.
            tokens = [*context, *continuation][-(self._max_length - 1) :]
            sequences.append(np.asarray(tokens, dtype=np.int32))
            starts.append(max(1, len(tokens) - len(continuation)))
        return self._engines.loglikelihoods(sequences, starts)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows that do not overlap."""
        windows = [[*self._windows(request.args[0])] for request in requests]
        scores = iter(self._loglikelihood_tokens([window for own in windows for window in own]))
        return [sum(next(scores)[0] for _ in own) for own in windows]

    def _windows(self, text: str) -> Iterator[tuple[None, list[int], list[int]]]:
        for window in utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._max_length - 2,
            context_len=1,
        ):
            yield (None, *utils.make_disjoint_window(window))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy completions, up to the first of the task's stop strings. Raises UserError where a task samples."""
        works = [_Generation(self, *request.args) for request in requests]
        tokens = FIRST_TOKENS
        while open_ones := [work for work in works if not work.done]:
            found = self._engines.complete([work.prompt for work in open_ones], tokens)
            for work, ids in zip(open_ones, found, strict=True):
                work.take(ids, tokens)
            tokens *= 2
        return [work.text for work in works]


class _Generation:
    """One completion, which grows until a stop string is in it."""

    def __init__(self, model: HarnessModel, context: str, settings: dict[str, Any]):
        if settings.get("do_sample") or settings.get("temperature"):
            raise UserError(f"--tasks: a task asks for sampling ({settings}); this evaluates greedily only")
        until = settings.get("until") or []
        self._until = [until] if isinstance(until, str) else until
        self._left = int(settings.get("max_gen_toks", 256))
        self._model, room = model, model._max_length - self._left
        if room < 1:
            raise UserError(
                f"model.max_length: {model._max_length} leaves no room for the {self._left} tokens that a task asks for"
            )
        self._start = model.tok_encode(context)[-room:]
        self._ids: list[int] = []
        self.text, self.done = "", False

    @property
    def prompt(self) -> np.ndarray:
        """What to go on from, int32 [P]."""
        return np.asarray([*self._start, *self._ids], dtype=np.int32)

    def take(self, ids: np.ndarray, asked: int) -> None:
        """`ids` are what came of asking for `asked` more tokens: fewer, or an end token last, where the model ended."""
        new = ids[: self._left].tolist()
        self._ids += new
        self._left -= len(new)
        self.text = self._model.tokenizer.decode(self._ids, skip_special_tokens=True)
        ends = [place for stop in self._until if stop and (place := self.text.find(stop)) >= 0]
        if ends:
            self.text = self.text[: min(ends)]
        ended = len(ids) < asked or (len(ids) > 0 and int(ids[-1]) in self._model._ends)
        self.done = bool(ends) or ended or self._left == 0


def harness(
    config: Config,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    chat: bool = False,
    run_code: bool = False,
) -> dict[str, Any]:
    """Scores of `model.path` on the harness's `tasks` ("paper" stands for the paper's six), with their settings.

    `include` is a folder with task files of one's own. Tasks that run code which the model has written are refused
    without `run_code`. Raises UserError for unknown tasks and for versions other than the pinned ones.
    """
    names = [name for task in tasks for name in (PAPER if task == "paper" else [task])]
    if not run_code and any(name.startswith("humaneval") for name in names):
        raise UserError("--tasks: humaneval runs code that the model has written; allow it with --run-code")
    manager = _manager(names, include)
    _refuse_other_versions(names, manager)
    tokenizer = load_tokenizer(config)
    ends = stop_ids(tokenizer, config.model)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Padded ids are not left out, as the harness's other backends do not either.
    with ray_session(config), serving(config, ends, None) as engines, _reaching_the_hub():
        found = evaluator.simple_evaluate(
            model=HarnessModel(engines, tokenizer, config.model.max_length, ends),
            tasks=names,
            task_manager=manager,
            num_fewshot=0,
            limit=limit,
            apply_chat_template=chat,
            confirm_run_unsafe_code=run_code,
        )
    assert found is not None
    return {
        "model": config.model.path,
        "revision": config.model.revision,
        "harness": version("lm_eval"),
        "settings": {"num_fewshot": 0, "limit": limit, "chat_template": chat, "greedy": True},
        "max_length": config.model.max_length,
        "versions": {name: value for name, value in found["versions"].items() if value is not None},
        "results": {name: _numbers(own) for name, own in found["results"].items()},
        "samples": found["samples"],
    }


@contextmanager
def _reaching_the_hub() -> Iterator[None]:
    try:
        yield
    except ConnectionError as e:
        raise UserError(
            f"--tasks: a task's data could not be fetched: {brief(e)}; without a network give task files of your own "
            "with --include"
        ) from e


def _manager(names: Sequence[str], include: Path | None) -> TaskManager:
    """An index of tasks that has all of `names`. That of the harness's own takes it 15 seconds."""
    folders = [str(OWN_TASKS), *([str(include)] if include else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=folders)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"--tasks: the harness has no {', '.join(unknown)}")
    return manager


def _refuse_other_versions(names: Sequence[str], manager: TaskManager) -> None:
    """Of the task files as they are indexed, before any engine starts."""
    for name in PAPER.keys() & names:
        found = ((manager.task_index[name].cfg or {}).get("metadata") or {}).get("version")
        if found is None or float(found) != float(PAPER[name]):
            raise UserError(
                f"--tasks: {name}: the installed harness has version {found}, results here are of {PAPER[name]}: "
                "install the one of the extra `eval`, or leave the task out"
            )


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    return {name.removesuffix(",none"): value for name, value in result.items() if isinstance(value, int | float)}


def save(found: dict[str, Any], out: Path) -> None:
    """Write scores with settings into `out`/results.json, and every row into `out`/TASK.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    for task, rows in found["samples"].items():
        write_jsonl(out / f"{task}.jsonl", rows, default=str)
    summary = {name: value for name, value in found.items() if name != "samples"}
    (out / "results.json").write_text(json.dumps(summary, indent=1) + "\n")


def show(found: dict[str, Any], console: Console) -> None:
    """The scores as a table."""
    settings = ", ".join(f"{name} {value}" for name, value in found["settings"].items())
    table = Table(title=f"{found['model']} (lm-evaluation-harness {found['harness']}; {settings})")
    for column in ("task", "version", "metric", "value", "± 95%"):
        table.add_column(column)
    for task, numbers in found["results"].items():
        for name, value in numbers.items():
            if not name.endswith("_stderr") and name not in {"sample_len", "sample_count"}:
                error = numbers.get(f"{name}_stderr")
                spread = "" if error is None else f"{1.96 * error:.3f}"
                table.add_row(task, str(found["versions"].get(task, "")), name, f"{value:.3f}", spread)
    console.print(table)
