"""All problems of a run as token ids, and which of them each optimizer step takes."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from sdft_dist.types import Problem


class ProblemSet(Sequence[Problem]):
    """Problems as columns of token ids; pickles without a copy, so every actor can hold all of them."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        columns: tuple[list[np.ndarray], ...] = ([], [], [])
        for p in problems:
            for column, ids in zip(columns, (p.prompt_ids, p.teacher_prompt_ids, p.demonstration_ids), strict=True):
                column.append(np.asarray(ids, dtype=np.int32))
        self._ids = [np.concatenate([*c, np.zeros(0, np.int32)]) for c in columns]
        self._ends = [np.cumsum([0, *map(len, c)]) for c in columns]

    def __len__(self) -> int:
        return len(self._ends[0]) - 1

    def __getitem__(self, i: int) -> Problem:  # type: ignore[override]  # no slices
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        prompt, teacher, demo = (ids[ends[i] : ends[i + 1]] for ids, ends in zip(self._ids, self._ends, strict=True))
        return Problem(prompt_ids=prompt, teacher_prompt_ids=teacher, demonstration_ids=demo)


def batch(step: int, *, num_problems: int, size: int, seed: int) -> list[int]:
    """Problem indices of one optimizer step: a pure function, so that resuming needs no state.

    Each epoch is a permutation of its own; a batch may span two epochs.
    """
    out: list[int] = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, num_problems)
        out.append(_permutation(seed, epoch, num_problems)[place])
    return out


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> list[int]:
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
