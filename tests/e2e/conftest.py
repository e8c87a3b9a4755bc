"""Learner processes and engine processes for the whole session: most of their cost is imports."""

import pytest
import ray
from harness import Hosts, Ranks, random_problems
from helpers import tiny_model


@pytest.fixture(scope="session")
def problems():
    """The problems that the shared processes hold."""
    return random_problems(8)


@pytest.fixture(scope="session")
def ranks(ray_cluster):
    ranks = Ranks()
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session", params=[True, False], ids=["tied", "untied"])
def small_model(request, tmp_path_factory):
    """A model folder; of session scope, so that tests on the same model run one after another."""
    return tiny_model(tmp_path_factory.mktemp("model"), tied=request.param)


@pytest.fixture(scope="session")
def hosts(ray_cluster, problems, tmp_path_factory):
    """A generator process and a teacher process that can serve one model after another."""
    hosts = Hosts(tiny_model(tmp_path_factory.mktemp("first")), problems)
    yield hosts
    for actor in [*hosts.generators.actors, *hosts.teachers.actors]:
        ray.kill(actor)


@pytest.fixture
def served(hosts, small_model):
    """The hosts, serving `small_model`."""
    hosts.serve(small_model)
    return hosts
