"""The three roles of a run as one: what is pushed to whom and when, and how lost engines are put right."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.pool import Pool
from actors.stream import Stream
from learner.group import LearnerGroup
from sdft_dist.config import Config
from sdft_dist.errors import Fault, NotServing
from sdft_dist.types import TrainItem


@dataclass(kw_only=True, slots=True)
class Fleet:
    """The three roles of a run. `teachers` has no actors for method=sft, and `generators` has none
    where there is nothing to sample or evaluate."""

    generators: Pool
    teachers: Pool
    learner: LearnerGroup
    rollouts: Stream
    config: Config
    start: int  # the first version that is pushed
    on_event: Callable[[str], None]
    version: int = -1  # of the student
    served: int = -1  # the version that was last pushed to the generators
    mends: int = 0  # since the last optimizer step

    @property
    def pools(self) -> tuple[Pool, Pool]:
        """Both roles that are engines."""
        return self.generators, self.teachers

    def to_generators(self, version: int) -> None:
        """Push the student. Generators that only evaluate get it when they are next asked for completions. The first
        push is waited for, so that a broken one fails before any work is lost."""
        self.version, self.mends = version, 0
        if self.generators.lost:
            self._mend(self.generators)
        elif self.generators.actors and (self.config.method == "sdft" or version == self.start):
            self._push_to_generators(wait=version == self.start)

    def complete(
        self, prompts: Sequence[np.ndarray], max_tokens: int, seeds: Sequence[int] | None = None
    ) -> list[np.ndarray]:
        """As Pool.complete, with the student's present weights. Where generators are lost meanwhile, they are replaced
        and all is done again. Raises Fault as `mend` does."""
        while True:
            self.mend()
            if self.served != self.version:
                self._push_to_generators(wait=False)
            with suppress(NotServing):
                return self.generators.complete(prompts, max_tokens, seeds)

    def to_teachers(self, version: int) -> None:
        """Push what teaches; a frozen base keeps its first version for good."""
        if self.teachers.lost:
            return  # mended, and pushed to, when they are needed
        if self.teachers.actors and (self.config.teacher.moves or version == self.start):
            self._push_to_teachers(version, wait=version == self.start)

    def versions(self) -> dict[str, int]:
        """Optimizer steps in the weights that were last pushed to each role."""
        return {"generator": self.served, "teacher": self.rollouts.teacher_version}

    def peak_gib(self) -> dict[str, float]:
        """Peak memory of one actor of each role that there is."""
        engines = {pool.role.removesuffix("s"): pool.peak_gib() for pool in self.pools if pool.actors}
        return {**engines, "learner": self.learner.peak_gib()}

    def update(self, step: int, num_steps: int, items: Sequence[TrainItem]) -> dict[str, Any]:
        """One optimizer step of the learner, for which engines that sleep give it their memory."""
        if not self.config.cluster.sleep:
            return self.learner.update(step, num_steps, items)
        for pool in self.pools:
            pool.sleep()
        metrics = self.learner.update(step, num_steps, items)
        for pool in self.pools:
            pool.wake_up()
        return metrics

    def mend(self) -> None:
        """Replace lost engines, between two optimizer steps. They serve again after a whole push. Raises Fault where
        engines are lost more often than `cluster.max_restarts` in one step."""
        for pool in self.pools:
            if pool.lost:
                self._mend(pool)

    def _mend(self, pool: Pool) -> None:
        self.mends += 1
        if self.mends > self.config.cluster.max_restarts:
            raise Fault(
                f"engines were lost {self.mends} times in one step, more than cluster.max_restarts: {_reasons(pool)}"
            )
        started = time.monotonic()
        while pool.lost:  # others may be lost meanwhile, as those of one node are
            self.on_event(f"lost {_reasons(pool)}")
            self.rollouts.abandon_lost()
            pool.replace_lost()
            pool.look()
        self.learner.open_push(pool)
        if pool is self.generators:
            self._push_to_generators(wait=True)
        else:
            version = self.version if self.config.teacher.moves else self.rollouts.teacher_version
            self._push_to_teachers(version, wait=True)
        self.on_event(f"{pool.role} serve version {self.version} again, after {time.monotonic() - started:.1f} s")

    def _push_to_generators(self, *, wait: bool) -> None:
        self.learner.push(self.generators, self.version, self.version, wait=wait)
        self.served = self.version

    def _push_to_teachers(self, version: int, *, wait: bool) -> None:
        self.learner.push(self.teachers, version, self.rollouts.oldest_teacher_version(), wait=wait)
        self.rollouts.teacher_version = version


def _reasons(pool: Pool) -> str:
    return "; ".join(f"{pool.role} {i}: {why}" for i, why in sorted(pool.lost.items()))
