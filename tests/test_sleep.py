"""Engines that share the learner's GPU sleep while it works, and wake before they are pushed to."""

from sdft_dist.cluster import Fleet


class Part:
    """A pool or a learner that writes down what it is asked."""

    def __init__(self, name, log):
        self.name, self.log, self.lost = name, log, {}

    def rest(self, asleep):
        self.log.append(f"{self.name} {'sleep' if asleep else 'wake'}")

    def update(self, step, num_steps, items):
        self.log.append("learn")
        return {"loss": 1.0}


def fleet(log, *, sleep):
    return Fleet(
        generators=Part("generators", log), teachers=Part("teachers", log), learner=Part("learner", log), rollouts=None,
        start=0, teacher_moves=True, max_mends=0, sleep=sleep, on_event=print,
    )  # fmt: skip


def test_they_sleep_around_the_learner_s_step():
    log = []
    assert fleet(log, sleep=True).update(0, 1, []) == {"loss": 1.0}
    assert log == ["generators sleep", "teachers sleep", "learn", "generators wake", "teachers wake"]


def test_they_stay_awake_otherwise():
    log = []
    fleet(log, sleep=False).update(0, 1, [])
    assert log == ["learn"]
