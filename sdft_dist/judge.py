"""`eval.scorer=judge`: a model behind an OpenAI-compatible endpoint says whether a completion is right.

Verdicts are cached, so that an evaluation that is repeated costs nothing; calls and tokens are counted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from sdft_dist.config import JudgeConfig
from sdft_dist.errors import ConfigError, Fault
from sdft_dist.jsonl import read_jsonl
from sdft_dist.prompts import fill

_VERDICT = re.compile(r"\b(incorrect|correct)\b", re.IGNORECASE)


class Case(NamedTuple):
    """One completion to judge."""

    prompt: str
    completion: str
    answer: str


class Judge:
    """Judges cases, several at a time. `calls`, `prompt_tokens` and `completion_tokens` are what that has cost,
    `unclear` counts replies without a verdict, which count as wrong."""

    def __init__(self, config: JudgeConfig) -> None:
        from openai import OpenAI

        if config.url is None or config.model is None:
            raise ConfigError("eval.judge: url and model are needed for eval.scorer=judge")
        key = os.environ.get(config.key_variable)
        if key is None:
            raise ConfigError(f"eval.judge.key_variable: the environment has no {config.key_variable}")
        self._config = config
        # The client waits longer and longer between attempts, and heeds Retry-After.
        self._client = OpenAI(base_url=config.url, api_key=key, max_retries=config.retries, timeout=config.timeout_s)
        self._lock = threading.Lock()
        self._known = _read(config.cache)
        self.calls = self.prompt_tokens = self.completion_tokens = self.unclear = 0

    def __call__(self, cases: Sequence[Case]) -> list[bool]:
        """Whether each case is right. Raises Fault where the endpoint fails for good."""
        from openai import OpenAIError

        try:
            with ThreadPoolExecutor(self._config.parallel) as threads:
                return list(threads.map(self._judge, cases))
        except OpenAIError as error:
            raise Fault(f"eval.judge.url: {self._config.url}: {error}") from error

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
        reply = self._known.get(key)
        if reply is None:
            reply = self._ask(question)
            self._remember(key, reply)
        verdicts = _VERDICT.findall(reply)
        if not verdicts:
            with self._lock:
                self.unclear += 1
        return bool(verdicts) and verdicts[-1].lower() == "correct"

    def _ask(self, question: str) -> str:
        assert self._config.model is not None
        temperature = self._config.temperature
        answer = self._client.chat.completions.create(
            model=self._config.model,
            messages=[{"role": "user", "content": question}],
            extra_body=None if temperature is None else {"temperature": temperature},
        )
        with self._lock:
            self.calls += 1
            if answer.usage is not None:
                self.prompt_tokens += answer.usage.prompt_tokens
                self.completion_tokens += answer.usage.completion_tokens
        return answer.choices[0].message.content or ""

    def _remember(self, key: str, reply: str) -> None:
        with self._lock:
            self._known[key] = reply
            if self._config.cache is not None:
                with Path(self._config.cache).open("a") as file:
                    file.write(json.dumps({"key": key, "reply": reply}) + "\n")


def _read(path: str | None) -> dict[str, str]:
    """The replies in a cache, by the hash of what was asked; a line that a kill has cut is removed, so that the next
    one begins a line. Raises UserError where another one is damaged."""
    if path is None or not Path(path).exists():
        return {}
    known = {entry["key"]: entry["reply"] for entry in read_jsonl(Path(path))}
    raw = Path(path).read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole < len(raw):
        os.truncate(path, whole)
    return known
