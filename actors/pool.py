"""Fan-out over the actors of one role: spreads work, keeps order, pushes to all. Rollouts go their own
way; see stream.py.

The driver's side: it holds actor handles and object references, never a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sdft_dist.errors import NotServing, UserError, brief, is_out_of_memory
from sdft_dist.last_words import is_death, obituary
from sdft_dist.remote import Events
from sdft_dist.types import Sample, TransportKind, WeightManifest

# Pieces of work, and tokens to generate, in one call at most, so that no answer takes as long as a hang would.
CALL, CALL_TOKENS = 512, 1 << 19


class Pool:
    """Actors of one role ("generators" or "teachers")."""

    def __init__(
        self,
        role: str,
        actors: Sequence[Any],
        timeout_s: float,
        events: Events,
        make: Callable[[int], Any] | None = None,
        workers: int = 1,
        transport: TransportKind = "gloo",
        start_timeout_s: float | None = None,
    ) -> None:
        self.workers = workers  # processes of each engine that take part in a push
        self.transport = transport  # of a push
        self.role, self.actors, self._timeout_s, self._events = role, list(actors), timeout_s, events
        self._start_timeout_s = start_timeout_s or timeout_s
        self._make = make  # a new actor in the place of a dead one, by its index
        self.lost: dict[int, str] = {}  # actors that serve nothing, and why
        self.busy: Callable[[int], bool] = lambda index: False  # whether calls are under way at an actor; see stream.py
        self._dead: set[int] = set()

    def wait_ready(self) -> None:
        """Returns when every engine stands; raises the first failure, and Preempted when the run was asked to stop."""
        self._wait_ready(self.actors, "start", may_stop=True)

    def sample(self, problems: Sequence[int]) -> list[Sample]:
        """One completion for each problem index, as the records themselves; for checks. Generators only."""
        return self._spread(problems, lambda actor, part: actor.sample.remote(part), "sample")

    def complete(
        self, prompts: Sequence[np.ndarray], max_tokens: int, seeds: Sequence[int] | None = None
    ) -> list[np.ndarray]:
        """Completions, int32 [C] each, in the prompts' order: greedy, or with `seeds` sampled as rollouts are.
        Generators only."""
        work = list(zip(prompts, seeds or [0] * len(prompts), strict=True))

        def send(actor: Any, part: Sequence[Any]) -> Any:
            own = [seed for _, seed in part] if seeds is not None else None
            return actor.complete.remote([prompt for prompt, _ in part], max_tokens, own)

        return self._spread(work, send, "complete", max(1, min(CALL, CALL_TOKENS // max_tokens)))

    def loglikelihoods(self, sequences: Sequence[np.ndarray], starts: Sequence[int]) -> list[tuple[float, bool]]:
        """For each sequence (int32 [T]) the log-probability of its tokens from `start` on, and whether every one of
        them is the likeliest. Generators only."""

        def send(actor: Any, part: Sequence[Any]) -> Any:
            return actor.loglikelihoods.remote([tokens for tokens, _ in part], [start for _, start in part])

        return self._spread(list(zip(sequences, starts, strict=True)), send, "log-likelihoods")

    def sleep(self) -> None:
        """Let every engine give up its GPU's memory."""
        self._ask_all(lambda actor: actor.sleep.remote(), "sleep")

    def wake_up(self) -> None:
        """Let every engine take its GPU's memory back."""
        self._ask_all(lambda actor: actor.wake_up.remote(), "wake up")

    def peak_gib(self) -> float:
        """Peak memory of the actor that has needed most; 0 where there is none."""
        return max(self._wait([a.peak_gib.remote() for a in self.actors], "peak memory"), default=0.0)

    def lose(self, index: int, error: Exception) -> None:
        """Note that an actor has died, or that it serves nothing after a push that failed. Raises `error`
        where it is neither."""
        if is_out_of_memory(getattr(error, "cause", None)):  # as it would be again
            raise UserError(
                f"{self.role}: a GPU's memory does not hold what an engine needs: lower "
                f"cluster.gpu_memory_utilization or cluster.max_sequences, or see what sdft plan says: {brief(error)}"
            ) from error
        if is_death(error):
            self._dead.add(index)
        elif not isinstance(error, NotServing):
            raise error
        self.lost.setdefault(index, obituary(error))

    def look(self, *, busy_too: bool = True) -> None:
        """Note actors that have died while they had nothing to do, which no call has told of. Without `busy_too` those
        with calls under way are not asked: these calls will tell, and an answer would come after them."""
        self._ask_all(lambda actor: actor.__ray_ready__.remote(), "to be there", busy_too=busy_too)

    def push_failed(self, index: int, actor: Any, error: Exception) -> None:
        """Note that `actor` did not take a push in whole, whatever the reason."""
        if self.actors[index] is actor:
            self.lose(index, error if is_death(error) else NotServing(str(error)))

    def kill(self, index: int, why: str) -> None:
        """End an actor that does not answer."""
        import ray

        ray.kill(self.actors[index])
        self._dead.add(index)
        self.lost[index] = why

    def replace_lost(self) -> None:
        """Start new actors in the places of the dead; other lost ones drop what they were doing. None serves before the
        next push. Actors that are lost during this call stay lost."""
        dead = set(self._dead)
        tainted = self.lost.keys() - dead
        for index in dead:
            assert self._make is not None
            self.actors[index] = self._make(index)
        self._wait_ready([self.actors[i] for i in dead], "start anew")
        self._wait([self.actors[i].forget.remote() for i in tainted], "forget")
        self._dead -= dead
        done = (dead | tainted) - self._dead
        self.lost = {i: why for i, why in self.lost.items() if i not in done}

    def join_push(self, host: str, port: int, keep: str | None) -> list[Any]:
        """Ask every actor to join the push group, and to keep the weight of that name as received;
        returns references to wait for."""
        size = 1 + len(self.actors) * self.workers
        return [
            actor.join_push.remote(
                {
                    "transport": self.transport,
                    "host": host,
                    "port": port,
                    "first_rank": 1 + i * self.workers,
                    "group_size": size,
                    "timeout_s": self._timeout_s,
                    "keep": keep,
                }
            )
            for i, actor in enumerate(self.actors)
        ]

    def receive(self, manifest: WeightManifest) -> list[Any]:
        """Ask every actor to take in a push; returns references to wait for."""
        return [actor.receive.remote(manifest) for actor in self.actors]

    def _ask_all(self, send: Callable[[Any], Any], what: str, *, busy_too: bool = True) -> None:
        """Send a call to every actor that is not lost, and note those that are lost by it."""
        well = [i for i in range(len(self.actors)) if i not in self.lost and (busy_too or not self.busy(i))]
        asked = [(i, send(self.actors[i])) for i in well]
        for index, ref in asked:
            try:
                self._wait([ref], what)
            except Exception as error:
                self.lose(index, error)  # raises any error but a loss

    def _spread(
        self, work: Sequence[Any], send: Callable[[Any, Sequence[Any]], Any], what: str, size: int = CALL
    ) -> list[Any]:
        """The answers to `work`, in its order; a call holds at most `size` pieces of it. Raises NotServing where an
        actor is lost meanwhile; `lost` then says which."""
        sent = []
        for i, actor in enumerate(self.actors):
            own = range(i, len(work), len(self.actors))
            for part in (own[first : first + size] for first in range(0, len(own), size)):
                sent.append((i, part, send(actor, [work[k] for k in part])))
        out: list[Any] = [None] * len(work)
        reasons = {}
        for i, part, ref in sent:
            try:
                (found,) = self._wait([ref], what, may_stop=True)
            except Exception as error:
                self.lose(i, error)  # raises any error but a loss
                reasons[i] = self.lost[i]
                continue
            for k, answer in zip(part, found, strict=True):
                out[k] = answer
        if reasons:
            raise NotServing(f"{self.role}, {what}: {'; '.join(f'{i}: {why}' for i, why in reasons.items())}")
        return out

    def _wait_ready(self, actors: Sequence[Any], what: str, *, may_stop: bool = False) -> None:
        refs = [actor.ready.remote() for actor in actors]
        what = f"{self.role} {what}"
        self._events.wait_all(refs, timeout_s=self._start_timeout_s, what=what, may_stop=may_stop)

    def _wait(self, refs: list[Any], what: str, *, may_stop: bool = False) -> list[Any]:
        what = f"{self.role} {what}"
        return self._events.wait_all(refs, timeout_s=self._timeout_s, what=what, may_stop=may_stop)
