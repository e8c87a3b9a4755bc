"""The path of samples between fake actors: everything arrives once, early steps first, within the bounds."""

from collections import deque
from types import SimpleNamespace

import pytest
from ray.exceptions import ObjectLostError

from actors.stream import Stream
from sdft_dist.types import Piece, Rollout, SampleKey, SampleRef, Scored, Span, TrainItem, VersionSpan

NOTHING = Span("work", 0.0, 0.0)


class FakeEvents:
    """Calls under way, each a pair of its actor and what it will do. An actor answers in order; which
    actor is next is the one called first, or the one called last."""

    def __init__(self, *, newest_first=False):
        self.pending, self.newest_first = deque(), newest_first

    def on(self, call, handler, failed):
        self.pending.append((call, handler, failed))

    def run_until(self, done, *, timeout_s, who):
        while not done():
            if not self.pending:
                raise TimeoutError(who())
            actor = self.pending[-1 if self.newest_first else 0][0][0]
            self.run(next(entry for entry in self.pending if entry[0][0] is actor))

    def run(self, entry):
        self.pending.remove(entry)
        (_, work), handler, failed = entry
        try:
            result = work()
        except RuntimeError as error:
            failed(error)
            return
        handler(result)


class FakeActor:
    """Its method `name` can be called as on a Ray actor; calls are written down."""

    def __init__(self, name, work):
        self.calls = []
        setattr(self, name, method(lambda *args: self._call(work, *args)))

    def _call(self, work, *args):
        self.calls.append(args)
        return self, lambda: work(*args)


def method(remote):
    """As Ray's handle on a method, which gives a reference to each of `num_returns` values."""
    return SimpleNamespace(options=lambda num_returns: SimpleNamespace(
        remote=lambda *args: [remote(*args), *(f"list {i} of {args}" for i in range(num_returns - 1))]
    ), remote=remote)  # fmt: skip


def generator(per_call=None):
    """Finishes `per_call` samples a call, or all."""
    taken = deque()

    def rollout(keys, slice_s):
        taken.extend(keys)
        done = [taken.popleft() for _ in range(min(per_call or len(taken), len(taken)))]
        samples = [
            SampleRef(
                key=key, num_prompt_tokens=5, num_completion_tokens=10, finish_reason="stop",
                policy_versions=(VersionSpan(0, 0, 10),), sample=Piece(0, 0),
            )
            for key in done
        ]  # fmt: skip
        return Rollout(samples=samples, span=NOTHING)

    return FakeActor("rollout", rollout)


def teacher(version=lambda: 0):
    def score(samples, lists):
        items = [
            TrainItem(
                key=s.key, num_prompt_tokens=5, num_completion_tokens=10, teacher_version=version(),
                targets=Piece(i * lists // len(samples), 0),
            )
            for i, s in enumerate(samples)
        ]  # fmt: skip
        return Scored(items=items, span=NOTHING)

    return FakeActor("score", score)


def keys(step, problems=4, copies=1):
    return [SampleKey(step, p, i) for p in range(problems) for i in range(copies)]


class FakePool:
    """Actors of one role, and which of them are lost."""

    def __init__(self, actors):
        self.actors, self.lost = list(actors), {}

    def lose(self, index, error):
        self.lost[index] = str(error)

    def kill(self, index, why):
        self.lost[index] = why


def stream(generators, teachers, events=None, **settings):
    defaults = {"slice_s": 0.05, "max_call_tokens": 1000, "target_bytes": 4, "max_bytes": 1 << 20, "timeout_s": 1.0}
    pools = FakePool(generators), FakePool(teachers)
    path = Stream(*pools, events or FakeEvents(), on_span=lambda *_: None, **(defaults | settings))
    path.pools = pools
    return path


def dying(actor, name, after):
    """The same actor, which dies at call number `after`."""
    work, calls = getattr(actor, name).remote, []

    def die_or_work(*args):
        calls.append(args)
        return (actor, lambda: (_ for _ in ()).throw(RuntimeError("killed"))) if len(calls) > after else work(*args)

    setattr(actor, name, method(die_or_work))
    return actor


def mending(path, **new):
    """New actors in the place of lost ones, as a Fleet puts them there."""

    def mend():
        path.abandon_lost()
        for pool, make in zip(path.pools, (new.get("generator"), new.get("teacher")), strict=True):
            for index in pool.lost:
                pool.actors[index] = make()
            pool.lost = {}

    path.mend = mend
    return path


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("slice_s", [None, 0.05])
def test_every_sample_arrives_once_and_in_order(slice_s, newest_first):
    per_call = None if slice_s is None else 1
    generators, teachers = [generator(per_call) for _ in range(2)], [teacher(), teacher()]
    path = stream(generators, teachers, FakeEvents(newest_first=newest_first), slice_s=slice_s)
    for step in range(3):
        path.submit(keys(step))
    for step in range(3):
        assert [item.key for item in path.take(keys(step))] == keys(step)
    scored = [sample.key for t in teachers for samples, _ in t.calls for sample in samples]
    assert len(scored) == len(set(scored)) == 12


def test_completions_of_one_prompt_go_to_one_generator():
    generators = [generator(), generator()]
    stream(generators, [teacher()]).submit(keys(0, problems=5, copies=3))
    homes = [{key.problem for key in g.calls[0][0]} for g in generators]
    assert not homes[0] & homes[1]
    assert sorted(map(len, homes)) == [2, 3]


def test_without_slices_batches_depend_on_the_keys_only():
    """Whichever generator answers first, the teachers get the same batches."""

    def batches(newest_first):
        teachers = [teacher(), teacher()]
        path = stream([generator(), generator()], teachers, FakeEvents(newest_first=newest_first), slice_s=None)
        path.submit(keys(0, problems=8))
        path.take(keys(0, problems=8))
        return [sorted(tuple(s.key for s in samples) for samples, _ in t.calls) for t in teachers]

    assert batches(False) == batches(True)


@pytest.mark.fault("more samples than memory for them", "fake actors", "later steps wait, the due one never does")
def test_later_steps_wait_while_too_many_bytes_are_held_and_the_due_step_never_does():
    one, events = teacher(), FakeEvents()
    path = stream([generator()], [one], events, max_bytes=4 * 10 * 5, target_bytes=4)  # five samples' targets
    path.submit(keys(0))
    path.submit(keys(1))
    path.submit(keys(2))
    path.take(keys(0))
    while events.pending:
        events.run(events.pending[0])
    scored = {s.key for samples, _ in one.calls for s in samples}
    assert len(scored) == 4 + 5, "the due step, and what fits beside it once that is taken"
    assert len(path.take(keys(1))) == 4
    assert sum(len(samples) for samples, _ in one.calls) == 12, "what waited for room is scored while the learner works"
    assert len(path.take(keys(2))) == 4
    tight = stream([generator()], [teacher()], max_bytes=1)
    tight.submit(keys(0))
    assert len(tight.take(keys(0))) == 4


def test_calls_to_a_teacher_are_bounded_in_tokens_and_sorted_by_prompt():
    one = teacher()
    path = stream([generator()], [one], max_call_tokens=30)  # two samples of 15 tokens
    path.submit(keys(0, problems=6))
    path.take(keys(0, problems=6))
    sizes = [len(samples) for samples, _ in one.calls]
    assert max(sizes) <= 2
    order = [s.key.problem for samples, _ in one.calls for s in samples]
    assert order == sorted(order)


def test_the_oldest_teacher_that_can_still_come():
    path = stream([generator()], [teacher(lambda: 3)])
    path.teacher_version = 3
    path.submit(keys(0, problems=1))
    path.submit(keys(1, problems=1))
    path.take(keys(0, problems=1))
    path.teacher_version = 5
    assert path.oldest_teacher_version() == 3
    path.take(keys(1, problems=1))
    assert path.oldest_teacher_version() == 5


def test_pools_know_who_has_calls_under_way():
    events = FakeEvents()
    path = stream([generator(), generator()], [teacher()], events)
    (generators, teachers) = path.pools
    path.submit(keys(0, problems=1))
    assert [generators.busy(0), generators.busy(1), teachers.busy(0)] == [True, False, False]
    events.run(events.pending[0])
    assert [generators.busy(0), generators.busy(1), teachers.busy(0)] == [False, False, True]
    events.run(events.pending[0])
    assert not teachers.busy(0)


def test_a_timeout_says_who_was_waited_for():
    silent = FakeActor("rollout", lambda keys, slice_s: Rollout(samples=[], span=NOTHING))
    path = stream([silent], [teacher()], slice_s=None)
    path.submit(keys(7))
    with pytest.raises(TimeoutError, match="4 samples of step 7 are missing: 4 at generator 0"):
        path.take(keys(7))


@pytest.mark.parametrize("slice_s", [None, 0.05])
def test_samples_of_a_lost_generator_are_sampled_again_and_none_arrives_twice(slice_s):
    per_call = None if slice_s is None else 1
    lost, other = dying(generator(per_call), "rollout", 0 if slice_s is None else 2), generator(per_call)
    one = teacher()
    path = mending(stream([lost, other], [one], slice_s=slice_s), generator=lambda: generator(per_call))
    for step in range(3):
        path.submit(keys(step))
    for step in range(3):
        assert [item.key for item in path.take(keys(step))] == keys(step)
    scored = [sample.key for samples, _ in one.calls for sample in samples]
    assert sorted(scored) == sorted(key for step in range(3) for key in keys(step))


def test_a_lost_teachers_samples_are_scored_again():
    path = stream([generator()], [dying(teacher(), "score", 1)], max_call_tokens=30)
    mending(path, teacher=teacher)
    path.submit(keys(0, problems=6))
    assert [item.key for item in path.take(keys(0, problems=6))] == keys(0, problems=6)
    assert path._held == 0


def missing(actor, times):
    """The same teacher, which cannot fetch what it is first given."""
    score, misses = actor.score.remote, iter([True] * times)

    def score_or_miss(*args):
        error = RuntimeError("the owner has died")
        error.cause = ObjectLostError("ab" * 14, "", "")
        return (actor, lambda: (_ for _ in ()).throw(error)) if next(misses, False) else score(*args)

    actor.score = method(score_or_miss)
    return actor


def test_a_teacher_that_can_never_fetch_them_ends_the_run():
    path = stream([generator()], [missing(teacher(), 100)])
    path.submit(keys(0))
    with pytest.raises(RuntimeError, match="the owner has died"):
        path.take(keys(0))


@pytest.mark.fault("samples gone with their node", "a teacher cannot fetch them", "sampled again; the teacher goes on")
def test_samples_that_a_teacher_cannot_fetch_are_sampled_again():
    path = stream([generator()], [missing(teacher(), 1)])
    path.submit(keys(0))
    assert [item.key for item in path.take(keys(0))] == keys(0)
    assert path._held == 0
    assert not path.pools[1].lost


@pytest.mark.fault("sample delivered twice", "late answer of a replaced teacher", "taken once")
def test_a_late_answer_of_a_replaced_teacher_is_not_taken():
    events, slow = FakeEvents(), teacher()
    path = mending(stream([generator()], [slow], events), teacher=teacher)
    path.submit(keys(0))
    events.run(events.pending[0])
    late = events.pending[0]
    path._failed(path._teachers, 0, slow, RuntimeError("silent"))
    assert len(path.take(keys(0))) == 4
    (_, work), handler, _ = late
    handler(work())
    assert not path._items


def test_a_late_answer_of_a_replaced_generator_is_not_counted():
    """Else more calls than meant would be under way at the new one."""
    events, slow = FakeEvents(), generator(per_call=1)
    path = mending(stream([slow], [teacher()], events), generator=lambda: generator(per_call=1))
    path.submit(keys(0))
    late = events.pending[0]
    path._failed(path._generators, 0, slow, RuntimeError("silent"))
    path.take(keys(0, problems=1))
    (_, work), handler, _ = late
    under_way = len(path._rolling[0])
    handler(work())
    assert len(path._rolling[0]) == under_way > 0


def test_without_anybody_who_mends_a_loss_is_an_error():
    path = stream([dying(generator(), "rollout", 0)], [teacher()])
    path.submit(keys(0))
    with pytest.raises(RuntimeError, match=r"lost: generators \{0: 'killed'\}, teachers \{\}"):
        path.take(keys(0))


def test_what_is_known_to_be_lost_before_its_calls_fail_is_sampled_again():
    """A push to a dead generator fails before the rollouts that it was given."""
    events = FakeEvents()
    lost = generator()
    path = mending(stream([lost], [teacher()], events), generator=generator)
    path.submit(keys(0))
    path.pools[0].lose(0, RuntimeError("a push failed"))
    late = events.pending.popleft()
    assert len(path.take(keys(0))) == 4
    _, _, failed = late
    failed(RuntimeError("killed"))
    assert not path.pools[0].lost, "the new one is well"


@pytest.mark.fault("engine answers nothing, others do", "fake actors", "ended; its samples done by another")
def test_an_engine_that_hangs_is_ended_and_its_samples_are_done_by_another():
    """Its calls are never answered: after the deadline it is killed, and mended like a dead one."""
    events, hanging = FakeEvents(), generator()
    hanging.rollout = method(lambda *args: (hanging, None))
    on = events.on
    events.on = lambda call, *handlers: None if call[1] is None else on(call, *handlers)
    path = mending(stream([hanging], [teacher()], events), generator=generator)
    path.submit(keys(3))
    assert len(path.take(keys(3))) == 4
