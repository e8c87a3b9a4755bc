"""What a command tells of a Ray that it cannot join or start; Ray itself is made up."""

import socket
from types import SimpleNamespace

import pytest
from helpers import config_of

from sdft_dist.errors import Fault, UserError
from sdft_dist.session import _reach, ray_session


@pytest.mark.parametrize(
    ("address", "error", "kind", "told"),
    [
        (None, Exception("The node timed out during startup. This could"), Fault, "Ray did not .* startup; try again$"),
        (None, ConnectionError("no answer"), Fault, "^Ray did not start on this machine, .*: no answer; try again$"),
        (None, ZeroDivisionError("a bug"), ZeroDivisionError, "^a bug$"),
        (
            None,
            OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /scratch/long"),
            UserError,
            "^TMPDIR: set RAY_TMPDIR to a shorter folder, .* cannot exceed 107 bytes: /scratch/long$",
        ),
        (
            "auto",
            ConnectionError("Failed to connect"),
            UserError,
            "^cluster.address: auto: Failed to connect; .* set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to it$",
        ),
    ],
)
def test_why_ray_cannot_be_used_is_told_and_another_error_stays(monkeypatch, address, error, kind, told):
    def init(**options):
        raise error

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(kind, match=told), ray_session(config_of(cluster={"address": address, "device": "cpu"})):
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
