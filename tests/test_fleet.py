"""What a fleet does about sleeping, pushing and losses, with fakes of its pools and its learner."""

import socket
from types import SimpleNamespace

import pytest
from helpers import config_of

from sdft_dist.errors import Fault, NotServing, UserError
from sdft_dist.fleet import Fleet
from sdft_dist.session import _reach, ray_session


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


def test_a_cluster_that_wants_a_token_is_no_traceback(monkeypatch):
    def init(**options):
        raise ConnectionError("Failed to connect")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    told = r"cluster.address: auto: Failed to connect; .* set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to it$"
    with pytest.raises(UserError, match=told), ray_session(config_of(cluster={"address": "auto"})):
        pass


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (Exception("The node timed out during startup. This could"), Fault, "Ray did not .* startup; try again$"),
        (ConnectionError("no answer"), Fault, "Ray did not start on this machine, .*: no answer; try again$"),
        (ZeroDivisionError("a bug"), ZeroDivisionError, "^a bug$"),
    ],
)
def test_a_machine_on_which_ray_does_not_come_up_is_a_fault_and_another_error_stays(monkeypatch, error, kind, told):
    def init(**options):
        raise error

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(kind, match=told), ray_session(config_of(cluster={"device": "cpu"})):
        pass


def test_a_temporary_folder_that_is_too_long_for_rays_sockets_is_told(monkeypatch):
    def init(**options):
        raise OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /scratch/long")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    told = "^TMPDIR: set RAY_TMPDIR to a shorter folder, .* cannot exceed 107 bytes: /scratch/long$"
    with pytest.raises(UserError, match=told), ray_session(config_of(cluster={"device": "cpu"})):
        pass


def test_a_ray_of_another_command_is_not_joined(monkeypatch):
    """It would end with that command, and the run with it."""
    started = {}
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **options: started.update(options))
    monkeypatch.setattr("ray.shutdown", lambda: started.clear())
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:1"))
    with ray_session(config_of(cluster={"device": "cpu"})):
        own = dict(started["resources"])
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0, **own})
    told = "^cluster.address: auto: the Ray there is another command's own"
    with pytest.raises(UserError, match=told), ray_session(config_of(cluster={"address": "auto"})):
        pass
    assert not started, "it was left again"
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    with ray_session(config_of(cluster={"address": "auto"})):
        pass


def test_a_head_that_does_not_answer_is_named():
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        port = there.getsockname()[1]
        with pytest.raises(UserError, match=f"cluster.address: nobody answers at 127.0.0.1:{port}"):
            _reach(f"127.0.0.1:{port}")
        there.listen()
        _reach(f"127.0.0.1:{port}")
        _reach("auto")
        with pytest.raises(UserError, match=r"got ray://.*: give the head's HOST:PORT"):
            _reach(f"ray://127.0.0.1:{port}")
