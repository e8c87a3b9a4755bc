"""`eval.scorer=judge`: a model behind an OpenAI-compatible endpoint says whether a completion is right.

Verdicts are cached, so that an evaluation that is repeated costs nothing; calls and tokens are counted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from sdft_dist.config import JudgeConfig
from sdft_dist.errors import ConfigError, Fault
from sdft_dist.files import unwritable
from sdft_dist.prompts import fill

# "NOT CORRECT", "isn't **correct**" and "not entirely correct" are negated; not so what stands behind a full stop.
_VERDICT = re.compile(
    r"((?:\bnot[ *_-]+|n['’]t[ *_]+)(?:(?:\w+ly|quite)[ *_]+)?)?(?<![a-z])(incorrect|correct)(?![a-z])", re.IGNORECASE
)
# What endpoints answer, as an error's code or a reply's end, to a question that they will never judge.
REFUSED = {"content_filter", "content_policy_violation", "context_length_exceeded", "string_above_max_length"}

LOOK_S = 1.0  # of waiting for a verdict, after which it is told that there is none yet


class Case(NamedTuple):
    """One completion to judge."""

    prompt: str
    completion: str
    answer: str


class Judge:
    """Judges cases, several at a time. `calls`, `prompt_tokens` and `completion_tokens` are what that has cost,
    `unclear` counts cases without a verdict in any of the attempts, which count as wrong. Only verdicts are cached."""

    def __init__(self, config: JudgeConfig) -> None:
        from openai import OpenAI

        if config.url is None or config.model is None:
            raise ConfigError("eval.judge: url and model are needed for eval.scorer=judge")
        if "@" in urlsplit(config.url).netloc:
            raise ConfigError(
                "eval.judge.url: holds a name or password, which the run's settings and its model's README would tell: "
                "leave it out; the key is what the variable that eval.judge.key_variable names holds"
            )
        key = os.environ.get(config.key_variable)
        if key is None:
            raise ConfigError(f"eval.judge.key_variable: the environment has no {config.key_variable}")
        self._config = config
        # The client waits longer and longer between attempts, and heeds Retry-After.
        self._client = OpenAI(base_url=config.url, api_key=key, max_retries=config.retries, timeout=config.timeout_s)
        self._lock = threading.Lock()
        _refuse_unwritable(config.cache)
        self._known = _read(config.cache)
        self.calls = self.prompt_tokens = self.completion_tokens = self.unclear = 0

    def __call__(self, cases: Sequence[Case]) -> list[bool]:
        """Whether each case is right; raises as `each` does."""
        return [verdict for verdict in self.each(cases) if verdict is not None]

    def each(self, cases: Sequence[Case]) -> Generator[bool | None]:
        """Whether each case is right, in order, and None for every LOOK_S in which the next one is not known yet;
        closed before its end it asks about no further ones. Raises Fault where the endpoint fails for good, or gives no
        text for one of them, or where the cache cannot be written to."""
        from openai import OpenAIError

        verdicts = [Future[bool]() for _ in cases]
        todo, over = SimpleQueue[tuple[Case, Future[bool]]](), threading.Event()
        for asked in zip(cases, verdicts, strict=True):
            todo.put(asked)

        def work() -> None:
            with suppress(Empty):
                while not over.is_set():
                    case, verdict = todo.get_nowait()
                    try:
                        verdict.set_result(self._judge(case))
                    except Exception as error:
                        verdict.set_exception(error)

        for _ in range(min(self._config.parallel, len(cases))):
            # Daemons: who stops has no time for replies that are under way, nor has the end of the process.
            threading.Thread(target=work, daemon=True).start()
        try:
            for verdict in verdicts:
                while not wait([verdict], LOOK_S).done:
                    yield None
                yield verdict.result()
        except OpenAIError as error:
            raise Fault(f"eval.judge.url: {self._config.url}: {error}") from error
        finally:
            over.set()

    def cost(self) -> dict[str, int]:
        """What all cases so far have cost."""
        return {
            "judge_calls": self.calls,
            "judge_prompt_tokens": self.prompt_tokens,
            "judge_completion_tokens": self.completion_tokens,
            "judge_unclear": self.unclear,
        }

    def _judge(self, case: Case) -> bool:
        question = fill(self._config.template, case._asdict())
        key = hashlib.sha256(f"{self._config.model}\n{question}".encode()).hexdigest()
        known = self._known.get(key)
        if known is not None:
            return known
        reply: str | None = None
        for _ in range(self._config.retries + 1):
            reply = self._ask(question)
            if reply is None:  # nor would it next time
                break
            verdict = _verdict(reply)
            if verdict is not None:
                self._remember(key, reply, verdict)
                return verdict
        if reply is not None and not reply.strip():
            raise Fault(
                f"eval.judge.url: {self._config.url}: no text in the last of {self._config.retries + 1} replies about "
                f"one completion: is it the base of an OpenAI-compatible endpoint (…/v1), and {self._config.model} "
                "a model that answers within its limit of tokens?"
            )
        with self._lock:
            self.unclear += 1
        return False

    def _ask(self, question: str) -> str | None:
        """The reply; no text where the endpoint sent none, or what is no completion: an error with status 200, a
        page. None where it refuses this question, as one that its filter does not let pass."""
        from openai import BadRequestError

        assert self._config.model is not None
        temperature = self._config.temperature
        answer: Any = None
        try:
            answer = self._client.chat.completions.create(
                model=self._config.model,
                messages=[{"role": "user", "content": question}],
                extra_body=None if temperature is None else {"temperature": temperature},
            )
        except json.JSONDecodeError:  # which the client lets through
            pass
        except BadRequestError as error:
            if error.code not in REFUSED:
                raise
            return None
        with self._lock:
            self.calls += 1
            usage = getattr(answer, "usage", None)
            if usage is not None:
                self.prompt_tokens += usage.prompt_tokens or 0
                self.completion_tokens += usage.completion_tokens or 0
        choices = getattr(answer, "choices", None)
        if choices and choices[0].finish_reason in REFUSED:
            return None
        message = choices[0].message if choices else None
        content = getattr(message, "content", None)
        return content if isinstance(content, str) else ""

    def _remember(self, key: str, reply: str, verdict: bool) -> None:
        with self._lock:
            self._known[key] = verdict
            if self._config.cache is None:
                return
            path = Path(self._config.cache)
            line = (json.dumps({"key": key, "reply": reply}) + "\n").encode()
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)  # trials of a sweep share one
                    if file.seek(0, os.SEEK_END):
                        file.seek(-1, os.SEEK_END)
                        line = line if file.read(1) == b"\n" else b"\n" + line  # after one that a kill has cut
                    file.write(line)
            except OSError as error:
                raise Fault(f"eval.judge.cache: {path}: cannot be written to: {error.strerror}") from error


def _verdict(reply: str) -> bool | None:
    """Whether the reply's last verdict is that the completion is right; None where it has none."""
    found = _VERDICT.findall(reply)
    if not found:
        return None
    negation, word = found[-1]
    return (word.lower() == "correct") != bool(negation)


def _refuse_unwritable(path: str | None) -> None:
    """Raises ConfigError where the cache could not be written. Nothing is made yet: it may be below a `run_dir`, which
    must be unused when the run takes it."""
    if path is None:
        return
    file = Path(path).absolute()
    if file.is_dir():
        raise ConfigError(f"eval.judge.cache: {path}: is a folder, expected a file")
    place = unwritable(file)
    if place is not None:
        raise ConfigError(f"eval.judge.cache: {path}: nothing can be written to {place}: give another file")


def _read(path: str | None) -> dict[str, bool]:
    """The verdicts in a cache, by the hash of what was asked. A line that is damaged, or being written, is asked for
    again."""
    known: dict[str, bool] = {}
    if path is None or not Path(path).exists():
        return known
    for line in Path(path).read_bytes().split(b"\n"):
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            entry = json.loads(line)
            verdict = _verdict(entry["reply"])
            if verdict is not None:
                known[entry["key"]] = verdict
    return known
