"""Samples on their way from the generators through the teachers to the learner, as the driver sees them.

A generator is given keys and runs its engine for a slice of time; what has finished goes on to a
teacher at once, while the rest keeps decoding. With `slice_s` None a generator finishes everything it
was given before it answers, so that batches, and with them the last bits of all results, depend on
nothing but the keys. The driver holds references and metadata only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from actors.pool import Pool
from sdft_dist.pieces import bound
from sdft_dist.remote import Events
from sdft_dist.types import OnSpan, Rollout, SampleKey, SampleRef, Scored, TrainItem

LIST_BYTES = 8 << 20  # of one list of targets, which a learner rank fetches whole for any one of them
MOST_MISSED = 8  # calls to teachers, in one step, whose samples were gone; more are not a lost node's doing
AHEAD = 2  # calls under way at each actor, so that none waits for the driver


class Call(NamedTuple):
    """What a teacher was given."""

    teacher_version: int  # of the last push when it was sent
    samples: tuple[SampleRef, ...]


class Stream:
    """Rollouts of several steps in flight. `target_bytes` is what one completion token's targets take in
    the object store; samples of later steps wait while more than `max_bytes` are held."""

    def __init__(
        self,
        generators: Pool,
        teachers: Pool,
        events: Events,
        *,
        slice_s: float | None,
        max_call_tokens: int,
        target_bytes: int,
        max_bytes: int,
        timeout_s: float,
        on_span: OnSpan,
    ) -> None:
        self._generators, self._teachers, self._events = generators, teachers, events
        self._slice_s, self._timeout_s, self._on_span = slice_s, timeout_s, on_span
        self._max_call_tokens, self._target_bytes, self._max_bytes = max_call_tokens, target_bytes, max_bytes
        self._decoding: list[set[SampleKey]] = [set() for _ in generators.actors]
        self._rolling: list[set[Any]] = [set() for _ in generators.actors]  # answers that each generator owes
        self._scoring: list[list[Call]] = [[] for _ in teachers.actors]
        self._homeless: list[SampleKey] = []  # whose generator was lost
        self._waiting: list[SampleRef] = []  # for a teacher
        self._items: dict[SampleKey, TrainItem] = {}
        self._held = 0  # completion tokens whose targets are scored or being scored
        self._missed = 0  # calls to teachers, in this step, whose samples were gone
        self._due = 0  # the step that the learner takes next
        self.teacher_version = 0  # of the last push that was sent to the teachers
        self.mend: Callable[[], None] | None = None  # puts lost engines right, between two optimizer steps
        generators.busy = lambda g: bool(self._rolling[g])
        teachers.busy = lambda t: bool(self._scoring[t])

    def submit(self, keys: Sequence[SampleKey]) -> None:
        """Start rollouts. Completions of one prompt go to one generator, which then reads it once."""
        problems = list(dict.fromkeys(key.problem for key in keys))
        well = [g for g in range(len(self._decoding)) if g not in self._generators.lost]
        if not well:
            self._homeless += keys
            return
        order = sorted(well, key=lambda g: (len(self._decoding[g]), g))
        home = {problem: order[i % len(order)] for i, problem in enumerate(problems)}
        for g in order:
            mine = [key for key in keys if home[key.problem] == g]
            if mine:
                self._decoding[g] |= set(mine)
                self._roll(g, mine)

    def take(self, keys: Sequence[SampleKey]) -> list[TrainItem]:
        """The scored samples of `keys`, in order; waits for them, and mends what is lost meanwhile."""
        self._due = min(key.step for key in keys)
        while not self._all_there(keys):
            if self._lost():
                if self.mend is None:
                    raise RuntimeError(f"lost: generators {self._generators.lost}, teachers {self._teachers.lost}")
                self.mend()
            homeless, self._homeless = self._homeless, []
            self.submit(homeless)
            self._dispatch()
            try:
                self._events.run_until(
                    lambda: self._all_there(keys) or self._lost() or bool(self._homeless),
                    timeout_s=self._timeout_s,
                    who=lambda: self._who([key for key in keys if key not in self._items]),
                )
            except TimeoutError as error:
                self._kill_silent(error)
        self._missed = 0
        items = [self._items.pop(key) for key in keys]
        self._held -= sum(item.num_completion_tokens for item in items)
        self._dispatch()  # to teachers that had to wait for room
        return items

    def queues(self) -> dict[str, int]:
        """Samples under way, by where they are."""
        return {
            "decoding": len(self._homeless) + sum(map(len, self._decoding)),
            "unscored": len(self._waiting),
            "scoring": sum(len(call.samples) for calls in self._scoring for call in calls),
            "scored": len(self._items),
        }

    def abandon_lost(self) -> None:
        """Take back what lost engines were working on: other engines, or their replacements, do it again."""
        for g in self._generators.lost:
            self._homeless += sorted(self._decoding[g])
            self._decoding[g], self._rolling[g] = set(), set()
        for t in self._teachers.lost:
            for call in self._scoring[t]:
                self._waiting += call.samples
                self._held -= sum(sample.num_completion_tokens for sample in call.samples)
            self._scoring[t] = []

    def oldest_teacher_version(self) -> int:
        """The oldest teacher whose targets can still be taken."""
        held = (item.teacher_version for item in self._items.values())
        under_way = (call.teacher_version for calls in self._scoring for call in calls)
        return min(chain(held, under_way), default=self.teacher_version)

    def _all_there(self, keys: Sequence[SampleKey]) -> bool:
        return all(key in self._items for key in keys)

    def _lost(self) -> bool:
        return bool(self._generators.lost or self._teachers.lost)

    def _kill_silent(self, error: TimeoutError) -> None:
        """End the engines that were asked and did not answer. Raises `error` where there are none."""
        silent = [(self._generators, g) for g, calls in enumerate(self._rolling) if calls]
        silent += [(self._teachers, t) for t, calls in enumerate(self._scoring) if calls]
        if not silent:
            raise error
        for pool, index in silent:
            pool.kill(index, str(error))

    def _failed(self, pool: Pool, index: int, actor: Any, error: Exception) -> None:
        if pool.actors[index] is actor:  # else a late answer of one that has been replaced
            pool.lose(index, error)

    def _roll(self, g: int, keys: Sequence[SampleKey]) -> None:
        actor = self._generators.actors[g]
        failed = partial(self._failed, self._generators, g, actor)
        answer, *lists = actor.rollout.options(num_returns=2).remote(keys, self._slice_s)
        self._rolling[g].add(answer)
        self._events.on(answer, partial(self._rolled, g, answer, lists), failed)

    def _rolled(self, g: int, answer: Any, lists: Sequence[Any], rollout: Rollout) -> None:
        if answer not in self._rolling[g]:  # a late one, of a generator that has been replaced
            return
        self._rolling[g].remove(answer)
        self._on_span("generator", g, rollout.span)
        found = bound(rollout.samples, lists)
        samples = [sample for sample in found if sample.key in self._decoding[g]]  # each once
        self._decoding[g] -= {sample.key for sample in samples}
        if self._slice_s is not None and self._decoding[g]:
            while len(self._rolling[g]) < AHEAD:
                self._roll(g, [])
        self._waiting += samples
        self._dispatch()

    def _dispatch(self) -> None:
        """Give waiting samples to the teachers, earlier steps first. Where possible, completions of one prompt go to
        one teacher, which then reads the prompt once."""
        well = [t for t in range(len(self._scoring)) if t not in self._teachers.lost]
        if self._slice_s is None:
            waiting, problems = self._waiting, list(dict.fromkeys(sample.key.problem for sample in self._waiting))
            home = {problem: well[i % len(well)] for i, problem in enumerate(problems)} if well else {}
            for t in well:
                self._score(t, [sample for sample in waiting if home[sample.key.problem] == t])
            self._waiting = [] if well else waiting
            return
        self._waiting.sort(key=lambda sample: (sample.key.step, sample.key.problem))
        free = [t for t in well for _ in range(AHEAD - len(self._scoring[t]))]
        free.sort(key=lambda t: len(self._scoring[t]))
        for i, t in enumerate(free):
            self._score(t, self._next_call(share=len(free) - i))

    def _next_call(self, share: int) -> list[SampleRef]:
        """A fair share of what waits, bounded by tokens and, for later steps, by the bytes held."""
        call: list[SampleRef] = []
        tokens, completion_tokens, count = 0, 0, -(-len(self._waiting) // share)
        while self._waiting and len(call) < count:
            sample = self._waiting[0]
            tokens += sample.num_prompt_tokens + sample.num_completion_tokens
            completion_tokens += sample.num_completion_tokens
            full = (self._held + completion_tokens) * self._target_bytes > self._max_bytes
            if (call and tokens > self._max_call_tokens) or (full and sample.key.step > self._due):
                break
            call.append(self._waiting.pop(0))
        return call

    def _score(self, t: int, samples: Sequence[SampleRef]) -> None:
        if not samples:
            return
        call = Call(self.teacher_version, tuple(samples))
        self._scoring[t].append(call)
        self._held += sum(sample.num_completion_tokens for sample in samples)
        actor = self._teachers.actors[t]
        size = self._target_bytes * sum(sample.num_completion_tokens for sample in samples)
        number = min(len(samples), 1 + size // LIST_BYTES)
        answer, *lists = actor.score.options(num_returns=1 + number).remote(samples, number)
        self._events.on(answer, partial(self._scored, t, call, lists), partial(self._unscored, t, actor, call))

    def _scored(self, t: int, call: Call, lists: Sequence[Any], scored: Scored) -> None:
        if self._take_back(t, call):
            self._on_span("teacher", t, scored.span)
            self._items |= {item.key: item for item in bound(scored.items, lists)}
            self._dispatch()

    def _unscored(self, t: int, actor: Any, call: Call, error: Exception) -> None:
        """Samples are gone with the node that they were on; or the teacher itself is lost."""
        from ray.exceptions import ObjectLostError

        if not isinstance(getattr(error, "cause", None), ObjectLostError):
            self._failed(self._teachers, t, actor, error)
        elif self._missed == MOST_MISSED:
            raise error
        elif self._take_back(t, call):
            self._missed += 1
            self._held -= sum(sample.num_completion_tokens for sample in call.samples)
            self._homeless += [sample.key for sample in call.samples]

    def _take_back(self, t: int, call: Call) -> bool:
        """Take a call off a teacher's list. False where it is not there any more: its samples have been given to
        another teacher since."""
        if call not in self._scoring[t]:
            return False
        self._scoring[t].remove(call)
        return True

    def _who(self, missing: Sequence[SampleKey]) -> str:
        """Where the missing samples are."""
        lost = set(missing)
        places = {f"generator {g}": len(keys & lost) for g, keys in enumerate(self._decoding)}
        places["no teacher yet"] = sum(sample.key in lost for sample in self._waiting)
        places["the teachers"] = len(lost) - sum(places.values())
        shown = ", ".join(f"{n} at {place}" for place, n in places.items() if n)
        return f"{len(missing)} samples of step {self._due} are missing: {shown}"
