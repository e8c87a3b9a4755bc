"""What a pool knows of its actors: which serve, which are lost and why, and what takes their places."""

from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from actors.pool import Pool
from sdft_dist.diagnosis import explain
from sdft_dist.errors import NotServing, UserError


class FakeActor:
    """Answers at once and writes down what it was asked."""

    def __init__(self):
        self.asked = []
        for name in ("ready", "forget", "__ray_ready__"):
            setattr(self, name, SimpleNamespace(remote=lambda name=name: self.asked.append(name)))


def pool(size=2):
    events = SimpleNamespace(wait_all=lambda refs, **_: refs)
    return Pool("generators", [FakeActor() for _ in range(size)], 1.0, events, lambda index: FakeActor())


def raised(error):
    raise error


def test_a_gpu_without_memory_is_a_matter_of_settings():
    """A new engine in its place would end in the same way."""
    error = RayTaskError("advance", "traceback", torch.OutOfMemoryError("CUDA out of memory")).as_instanceof_cause()
    with pytest.raises(UserError, match=r"generators: a GPU's memory .* lower cluster.gpu_memory_utilization or"):
        pool().lose(0, error)
    assert str(explain(error, [])).startswith("a GPU's memory does not hold the learner's step: lower learner.tokens")


def test_the_dead_are_replaced_and_the_tainted_forget():
    one = pool(3)
    before = list(one.actors)
    one.lose(0, RayActorError())
    one.push_failed(1, before[1], RuntimeError("checksum of the bucket a … b is wrong"))
    assert one.lost.keys() == {0, 1}
    assert one.lost[1] == "checksum of the bucket a … b is wrong"
    one.replace_lost()
    assert one.lost == {}
    assert one.actors[0] is not before[0]
    assert one.actors[0].asked == ["ready"]
    assert one.actors[1:] == before[1:]
    assert [actor.asked for actor in before[1:]] == [["forget"], []]


def test_an_actor_that_rays_memory_monitor_has_ended_is_dead():
    one = pool()
    said = "1 worker(s) were killed due to the node running low on memory. Memory on the node …\nRefer to the docs"
    one.lose(0, OutOfMemoryError(said))
    assert one.lost == {0: "1 worker(s) were killed due to the node running low on memory"}
    gone = one.actors[0]
    one.replace_lost()
    assert one.actors[0] is not gone


def test_a_push_that_an_actor_missed_by_its_death_replaces_it():
    one = pool()
    one.push_failed(0, one.actors[0], RayActorError())
    gone = one.actors[0]
    one.replace_lost()
    assert one.actors[0] is not gone
    one.push_failed(0, gone, RayActorError())
    assert one.lost == {}, "what befell the old one is no matter of the new one"


def test_one_that_died_while_it_had_nothing_to_do_is_found():
    one = pool(3)
    dead, there = RayActorError(), [one.actors[i] for i in (0, 2)]
    one._events.wait_all = lambda refs, **_: refs if dead not in refs else raised(dead)
    one.actors[1].__ray_ready__ = SimpleNamespace(remote=lambda: dead)
    one.look()
    assert one.lost.keys() == {1}
    one.replace_lost()
    one.look()
    assert one.lost == {}
    assert [actor.asked for actor in there] == [["__ray_ready__"] * 2] * 2


def test_one_that_has_calls_under_way_is_not_waited_for_before_a_push():
    """Its answer would come after them, and the learner stand idle as long; its end is told by them."""
    one = pool(3)
    one.busy = lambda index: index == 1
    one.look(busy_too=False)
    assert [actor.asked for actor in one.actors] == [["__ray_ready__"], [], ["__ray_ready__"]]
    one.look()
    assert one.actors[1].asked == ["__ray_ready__"]


def test_an_error_of_the_program_is_no_loss():
    one = pool()
    with pytest.raises(KeyError):
        one.lose(0, KeyError("a bug"))
    one.lose(0, NotServing("a push must succeed before it serves"))
    assert 0 in one.lost


def test_a_start_may_take_longer_than_work_and_may_be_given_up():
    """Weights of 8B parameters are read for minutes; a call that takes as long is a hang. In the midst of a step a run
    that is asked to stop puts its engines right first, as its state is none of a step's yet."""
    allowed = {}

    def wait_all(refs, timeout_s, what, may_stop=False):
        allowed[what] = timeout_s, may_stop

    events = SimpleNamespace(wait_all=wait_all)
    one = Pool("teachers", [FakeActor()], 1.0, events, lambda index: FakeActor(), start_timeout_s=60.0)
    one.wait_ready()
    one.lose(0, RayActorError())
    one.replace_lost()
    assert allowed == {
        "teachers start": (60.0, True),
        "teachers start anew": (60.0, False),
        "teachers forget": (1.0, False),
    }


def test_work_goes_out_in_calls_of_a_limited_size_and_comes_back_in_order(monkeypatch):
    """A call whose answer takes longer than a hang may would be taken for one."""
    monkeypatch.setattr("actors.pool.CALL", 3)
    monkeypatch.setattr("actors.pool.CALL_TOKENS", 12)
    one, sizes = pool(2), []

    def complete(prompts, max_tokens, seeds):
        sizes.append(len(prompts))
        return [10 * prompt for prompt in prompts]

    for actor in one.actors:
        actor.complete = SimpleNamespace(remote=complete)
    assert one.complete(list(range(11)), 4) == [10 * i for i in range(11)]
    assert sizes == [3, 3, 3, 2]
    assert one.complete([5], 4) == [50]
    sizes.clear()
    one.complete(list(range(6)), 7)
    assert sizes == [1] * 6, "long completions come in smaller calls"
