"""Learner processes and engines for the whole session: most of their cost is imports."""

from types import SimpleNamespace

import pytest
import ray
from chaos import STEPS, lab, last_checkpoint
from harness import Ranks, config_for, engine_pools, random_problems
from helpers import tiny_model
from processes import ended, start

from sdft_dist.runlog import read_metrics


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The last checkpoint and the losses of a run of STEPS steps on one node that nobody touched."""
    folder = tmp_path_factory.mktemp("quiet")
    config = lab(folder / "quiet", STEPS, 1)
    process, _ = start(config, folder / "quiet")
    ended(process)
    return last_checkpoint(config), [m["loss"] for m in read_metrics(folder / "quiet" / "run", "train")]


@pytest.fixture(scope="session")
def problems():
    """The problems that the shared engines hold."""
    return random_problems(8)


@pytest.fixture(scope="session")
def ranks(ray_cluster):
    ranks = Ranks()
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def hosts(ray_cluster, problems, tmp_path_factory):
    """A generator and a teacher whose processes load one model after another."""
    pools = engine_pools(config_for(tiny_model(tmp_path_factory.mktemp("first"))), problems)
    yield pools
    for pool in pools:
        ray.kill(pool.actors[0])


@pytest.fixture(scope="session", params=[True, False], ids=["tied", "untied"])
def served(request, ray_cluster, problems, tmp_path_factory):
    """A model folder, and a generator and a teacher on it that keep a pushed head and report up to 50 ids."""
    model = tiny_model(tmp_path_factory.mktemp("model"), tied=request.param)
    generators, teachers = engine_pools(config_for(model, loss={"top_k": 50}), problems)

    def configure(config):
        ray.get([a.configure.remote(config) for a in [*generators.actors, *teachers.actors]])

    yield SimpleNamespace(model=model, generators=generators, teachers=teachers, configure=configure)
    for actor in [*generators.actors, *teachers.actors]:
        ray.kill(actor)
