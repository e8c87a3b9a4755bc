"""The driver's handle on the ranks, with fakes of them and of the engines."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from helpers import config_of

from learner import group
from learner.group import LearnerGroup
from learner.tally import RankMetrics, Tally
from sdft_dist.errors import NotServing, UserError
from sdft_dist.types import ShardFile, WeightManifest


class Events:
    """Calls answer at once; notes how long each was given, and which end where the run is asked to stop."""

    def __init__(self):
        self.allowed, self.stoppable = {}, set()

    def wait_all(self, refs, *, timeout_s, what, may_stop=False):
        self.allowed[what] = timeout_s
        self.stoppable |= {what} if may_stop else set()
        for ref in refs:
            if isinstance(ref, Exception):
                raise ref
        return refs

    def on(self, ref, handler, failed):
        pass


def actor(**answers):
    return SimpleNamespace(
        **{name: SimpleNamespace(remote=lambda *args, found=found: found) for name, found in answers.items()}
    )


def made(*ranks, **sections):
    return LearnerGroup(config_of(cluster={"timeout_s": 10}, **sections), ranks, Events(), lambda *_: None)


def test_ranks_that_do_not_see_the_run_directory_are_named(tmp_path):
    made(actor(sees=True)).must_see(tmp_path / "run" / "config.yaml")
    with pytest.raises(UserError, match=r"run_dir: .*run is not there for learner ranks 1, 2: give a folder on a file"):
        made(actor(sees=True), actor(sees=False), actor(sees=False)).must_see(tmp_path / "run" / "config.yaml")


def test_a_start_may_be_given_up_and_a_step_may_not():
    """Nothing is lost by the one; in the other ranks may be at different points, and the step would not be saved."""
    metrics = RankMetrics(tally=Tally(), grad_norm=1.0, learning_rate=1.0, slots=1, spans=())
    one = made(actor(address=("host", 1), start=None, update=metrics))
    one.start()
    one.update(0, 1, [])
    assert one._events.stoppable == {"learner address", "learner start"}


@pytest.mark.parametrize("rollout", [{}, {"top_p": 0.7}, {"top_k": 5}, {"from_teacher": True}])
def test_log_probs_are_compared_where_both_sides_mean_the_same_distribution(rollout):
    tally = Tally(tokens=1, difference=0.5, importance=1.0, importance_squares=1.0)
    rank = actor(update=RankMetrics(tally=tally, grad_norm=1.0, learning_rate=1.0, slots=1, spans=()))
    metrics = made(rank, rollout=rollout).update(0, 1, [])
    assert ("logprob_difference_mean" in metrics) == (not rollout)


def test_a_checkpoint_may_take_as_long_as_a_slow_disk_needs():
    one = made(actor(state_bytes=100 * group.SLOW_DISK, finish_saving=[ShardFile(name="a", bytes=1, sha256="")]))
    one.state_bytes()
    assert one.finish_saving(wait=True)
    assert one._events.allowed["learner finish_saving"] == 100


@pytest.mark.parametrize("gone", [False, True])
def test_nothing_is_broadcast_between_gpus_where_a_receiver_is_gone(gone):
    """NCCL would wait for it for ever."""
    empty = WeightManifest(version=0, buckets=())
    pushed, lost = [], {}
    rank = actor(manifest=empty)
    rank.push = SimpleNamespace(remote=lambda *args: pushed.append(args) or SimpleNamespace())
    receivers = SimpleNamespace(
        role="generators", transport="nccl", workers=1, receive=lambda manifest: [None], actors=[None], lost=lost,
        push_failed=lambda *_: None, look=lambda busy_too: lost.update({0: "killed"} if gone and not busy_too else {}),
    )  # fmt: skip
    made(rank).push(receivers, 1, 1)
    assert len(pushed) == (not gone)
    with pytest.raises(NotServing, match="killed") if gone else nullcontext():
        made(rank).push(receivers, 1, 1, wait=True)
