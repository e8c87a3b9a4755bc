"""What a fleet does about sleeping, pushing and losses, with fakes of its pools and its learner."""

import pytest
from helpers import config_of

from sdft_dist.errors import Fault, NotServing
from sdft_dist.fleet import Fleet


class Part:
    """A pool or a learner that writes down what it is asked; a pool is lost in its next `losses` completions."""

    def __init__(self, name, log, losses=0):
        self.name, self.role, self.log, self.losses = name, name, log, losses
        self.lost, self.actors = {}, [None]
        self.meanwhile = []  # who else is lost while the lost are replaced
        self.unheard = []  # who has died without having had anything to do

    def sleep(self):
        self.log.append(f"{self.name} sleep")

    def wake_up(self):
        self.log.append(f"{self.name} wake up")

    def update(self, step, num_steps, items):
        self.log.append("learn")
        return {"loss": 1.0}

    def open_push(self, pool):
        self.log.append(f"open {pool.name}")

    def push(self, pool, version, oldest, *, wait=False):
        self.log.append(f"push {version}")

    def replace_lost(self):
        self.lost = {self.meanwhile.pop(): "killed"} if self.meanwhile else {}

    def look(self):
        if self.unheard:
            self.lost[self.unheard.pop()] = "killed"

    def abandon_lost(self):
        self.log.append("abandon")

    def complete(self, prompts, max_tokens, seeds):
        if self.losses:
            self.losses -= 1
            self.lost[0] = "killed"
            raise NotServing("generators, complete: 0: killed")
        self.log.append("complete")
        return prompts


def fleet(log, *, sleep=False, method="sdft", losses=0):
    shared = {"colocate": "all", "sleep": True} if sleep else {}
    config = config_of(method=method, cluster={"max_restarts": 2, **shared})
    return Fleet(
        generators=Part("generators", log, losses), teachers=Part("teachers", log), learner=Part("learner", log),
        rollouts=Part("rollouts", log), config=config, start=0, on_event=log.append,
    )  # fmt: skip


def test_they_sleep_around_the_learner_s_step():
    log = []
    assert fleet(log, sleep=True).update(0, 1, []) == {"loss": 1.0}
    assert log == ["generators sleep", "teachers sleep", "learn", "generators wake up", "teachers wake up"]


def test_they_stay_awake_otherwise():
    log = []
    fleet(log).update(0, 1, [])
    assert log == ["learn"]


def test_generators_that_only_evaluate_get_the_student_when_they_are_asked():
    log = []
    one = fleet(log, method="sft")
    for version in range(4):
        one.to_generators(version)
    assert log == ["push 0"], "the first, which fails before any work is lost"
    for _ in range(2):
        one.complete(["p"], 4)
    assert log == ["push 0", "push 3", "complete", "complete"]


def test_generators_that_are_lost_while_they_evaluate_are_put_right_and_asked_again():
    log = []
    one = fleet(log, losses=2)
    one.to_generators(7)
    assert one.complete(["p"], 4) == ["p"]
    assert [line for line in log if not line.startswith("generators serve")] == [
        "push 7", *["lost generators 0: killed", "abandon", "open generators", "push 7"] * 2, "complete",
    ]  # fmt: skip
    with pytest.raises(Fault, match="engines were lost 3 times in one step"):
        fleet([], losses=3).complete(["p"], 4)


@pytest.mark.fault("a node with several generators lost", "fake pool", "all of their samples are done again")
def test_what_an_engine_was_doing_that_is_lost_while_others_are_replaced_is_taken_from_it_too():
    log = []
    one = fleet(log)
    one.generators.lost[0] = "killed"
    one.generators.meanwhile, one.generators.unheard = [1], [2]
    one.mend()
    first, others = "lost generators 0: killed", "lost generators 1: killed; generators 2: killed"
    assert log[:-1] == [first, "abandon", others, "abandon", "open generators", "push -1"]
