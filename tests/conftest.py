"""Fixtures that are dear to start: one Ray cluster for the session, actors that tests share."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

pytest_plugins = ["fault_table"]
# What needs an extra that is not installed, such as `eval` beside `gpu` and `dev`, cannot even be imported.
collect_ignore = [] if importlib.util.find_spec("lm_eval") else ["test_harness_model.py", "e2e/test_harness.py"]
HERE = Path(__file__).parent
# Ray's workers import the test actors' classes.
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE / "e2e"), os.environ.get("PYTHONPATH", "")])

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items):
    """Everything in tests/e2e uses the real stack. Whole runs on a GPU come last: `make gpu` may have no time for all
    of them, and what is quick has been said by then."""
    for item in items:
        if "/e2e/" in str(item.path):
            item.add_marker(pytest.mark.e2e)
    items.sort(key=lambda item: {"e2e", "gpu"} <= {marker.name for marker in item.iter_markers()})


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A small random model's folder, only to be read."""
    from helpers import tiny_model

    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray cluster, the same as `sdft train` starts."""
    from helpers import config_of

    from sdft_dist.session import ray_session

    with ray_session(config_of()):
        yield
