"""A cluster of several nodes, all on this machine: one is lost, one is drained."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from chaos import ROLES, STEPS, finished_alike, lab, pids_of, recovery, steps_done, wait_for_step
from processes import MARK, PATIENCE_S, ended, start
from ray.cluster_utils import Cluster

from sdft_dist.stop import LOOK_S

pytestmark = pytest.mark.chaos

NODE = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}


@contextmanager
def three_nodes(monkeypatch, *offers):
    """A head and two more nodes, each with Ray's resources that it offers; their processes carry `mark`."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    head, *others = [NODE | {"resources": own} for own in offers]
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for node in others:
        cluster.add_node(**node)
    cluster.wait_for_nodes()
    cluster.mark = mark
    yield cluster
    cluster.shutdown()


@pytest.fixture
def nodes(monkeypatch):
    with three_nodes(monkeypatch, {}, {}, {}) as cluster:
        yield cluster


@pytest.fixture
def apart(monkeypatch):
    """A head for the learner, a node for generators and one for teachers."""
    with three_nodes(monkeypatch, {"sdft_learner": 1}, {"sdft_generator": 1}, {"sdft_teacher": 1}) as cluster:
        yield cluster


def test_a_run_without_an_address_leaves_a_cluster_of_this_machine_alone(nodes):
    program = (
        "import ray; from sdft_dist.session import ray_session; from helpers import config_of\n"
        "with ray_session(config_of()):\n"
        "    print(ray.get_runtime_context().gcs_address, len(ray.nodes()))"
    )
    environment = os.environ | {"RAY_ADDRESS": nodes.address}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    address, count = done.stdout.split()[-2:]
    assert (address != nodes.address, count) == (True, "1")


def homes(cluster):
    """The node of each role's actor, of those besides the head, and the pid of the node's raylet."""
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes}
    found = {}
    for role in ROLES:
        for pid in pids_of(role, cluster.mark):
            parent = psutil.Process(pid).ppid()
            if parent in raylets:
                found[role] = (raylets[parent], parent)
    return found


def joined(cluster, folder, **settings):
    """A run on the cluster, and its process at step 2."""
    config = lab(folder, STEPS, 1).changed(cluster={"address": cluster.address, **settings})
    process, _ = start(config, folder, mark=cluster.mark)
    wait_for_step(Path(config.run_dir), 2, process)
    return config, process


@pytest.mark.fault(
    "node lost", "its raylet killed, one of three", "its actors are placed on other nodes, the end bit-equal"
)
def test_actors_of_a_lost_node_are_placed_on_others(undisturbed, nodes, tmp_path, record_property):
    config, process = joined(nodes, tmp_path / "run")
    process.send_signal(signal.SIGSTOP)  # ten steps take it a second, and may be done before the node is missed
    where = homes(nodes)
    assert len({raylet for _, raylet in where.values()}) == 2, "actors are spread over the nodes"
    node, raylet = next(iter(where.values()))
    nodes.worker_nodes.remove(node)  # the raylet's end is all that the cluster hears
    threading.Timer(3.0, process.send_signal, [signal.SIGCONT]).start()
    record_property("node lost", recovery(Path(config.run_dir), process, raylet))
    ended(process)
    finished_alike(config, undisturbed)


@pytest.mark.fault(
    "node lost and put back", "the only node for teachers, 5 s without", "the run waits for it, the end bit-equal"
)
def test_roles_on_nodes_of_their_own_equal_one_node_and_wait_for_a_node_that_comes_back(undisturbed, apart, tmp_path):
    config, process = joined(apart, tmp_path / "run", pin_roles=True)
    where = homes(apart)
    assert where["generator"][1] != where["teacher"][1]
    assert "learner rank" not in where, "it is on the head"
    node, raylet = where["teacher"]
    apart.worker_nodes.remove(node)
    for pid in (raylet, *pids_of("teacher", apart.mark)):  # which outlives it by seconds, in which the run would end
        os.kill(pid, signal.SIGKILL)
    time.sleep(5)
    before = steps_done(Path(config.run_dir))
    apart.add_node(**NODE, resources={"sdft_teacher": 1})
    ended(process)
    assert before < STEPS, "it did not go on without"
    finished_alike(config, undisturbed)


@pytest.mark.fault("node drained", "ray drain-node", "checkpoint, exit 3, resumed bit-equal")
def test_a_draining_node_ends_the_run_with_its_state_saved(undisturbed, nodes, tmp_path):
    config, process = joined(nodes, tmp_path / "run")
    node, _ = next(iter(homes(nodes).values()))
    drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", nodes.address, "--node-id"]
    drain += [node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "maintenance"]
    process.send_signal(signal.SIGSTOP)  # the whole run takes less time than the command that drains
    subprocess.run([*drain, "--deadline-remaining-seconds", "300"], check=True, capture_output=True, timeout=PATIENCE_S)
    time.sleep(LOOK_S)  # so that it looks as soon as it goes on
    process.send_signal(signal.SIGCONT)
    output = ended(process, 3)
    assert "is saved; go on with --resume auto" in output
    process, _ = start(config, tmp_path / "run", "--resume", "auto", mark=nodes.mark)
    ended(process)
    finished_alike(config, undisturbed)
