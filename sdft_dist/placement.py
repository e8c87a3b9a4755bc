"""The placement group of a run's actors, and the Ray options of each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from sdft_dist.config import Config
from sdft_dist.errors import Fault, Preempted, UserError
from sdft_dist.topology import CPU_SHARE, Need, bundles, lacking, needs, placed_on, push_transport, spot_of
from sdft_dist.types import TransportKind

ALLOCATOR = "PYTORCH_ALLOC_CONF"


@dataclass(frozen=True, slots=True)
class Places:
    """A placement group, the needs that its bundles answer from bundle `first` on, the device, and how weights
    travel."""

    wanted: list[Need]
    group: Any
    first: int
    device: str
    transport: TransportKind

    def has(self, role: str) -> bool:
        """Whether there is room for the role."""
        return any(role in need.roles for need in self.wanted)

    def options(self, role: str, index: int, sharing: int) -> dict[str, Any]:
        """Ray options of actor `index` of a role; `sharing` as in `environment`."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        spot = spot_of(self.wanted, role, index)
        variables = environment(sharing) if self.device == "cpu" else {}
        if self.device == "cuda" and role == "learner":  # engines have what they need from the start
            options = os.environ.get(ALLOCATOR, _allocator(self.transport))
            variables = {ALLOCATOR: options} if options else {}
        return {
            "num_gpus": spot.gpus,
            "num_cpus": CPU_SHARE,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, self.first + spot.bundle),
            **({"runtime_env": {"env_vars": variables}} if variables else {}),
        }


@contextmanager
def placed(
    config: Config,
    device: str,
    roles: Collection[str],
    wait_for_nodes: bool = False,
    stop: Callable[[], bool] = lambda: False,
    on_event: Callable[[str], None] = lambda text: None,
) -> Iterator[Places]:
    """Room for all actors of `roles` that the run needs: the placement group that this process was given, as a trial
    of a sweep is, or one of its own that ends with the block. It waits for room, with
    `wait_for_nodes` or `cluster.autoscaling` for nodes too, as long as cluster.start_timeout_s. Raises UserError where
    the cluster is too small, Fault where no room came, and Preempted where `stop` says so while it waits."""
    import ray

    wanted, transport = needs(config, device, roles), push_transport(config, device)
    given = ray.util.get_current_placement_group()
    if given is not None and given.bundle_specs[1:] == bundles(wanted):  # the first holds the trial's own process
        yield Places(wanted, given, 1, device, transport)
        return
    nodes = ray.nodes()
    if not any(node["Alive"] for node in nodes):
        raise Fault("the Ray cluster is gone: no node of it is alive; start it again")
    missing = lacking(wanted, nodes)
    if missing and not (wait_for_nodes or config.cluster.autoscaling):
        raise UserError(f"cluster: {missing}; cluster.autoscaling=true waits for nodes to join")
    # GPUs close together, learner ranks next to each other; without GPUs, spread over the nodes' cores.
    group = ray.util.placement_group(bundles(wanted), strategy="PACK" if device == "cuda" else "SPREAD")
    try:
        why = missing or "others hold the room for " + ", ".join(map(str, wanted))
        patience_s = config.cluster.start_timeout_s
        deadline = time.monotonic() + patience_s
        if missing:
            on_event(f"waiting for nodes: {missing}")
        while not group.wait(1):
            if stop():
                raise Preempted(f"asked to stop while waiting for room: {why}")
            if time.monotonic() > deadline:
                raise Fault(f"no room within cluster.start_timeout_s={patience_s:g}: {why}")
        names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
        if len(names) > 1:
            homes = ray.util.placement_group_table(group)["bundles_to_node_id"]
            on_event(placed_on(wanted, (names.get(homes[i], homes[i]) for i in sorted(homes))))
        yield Places(wanted, group, 0, device, transport)
    finally:
        ray.util.remove_placement_group(group)


def _allocator(transport: TransportKind) -> str:
    """torch's options for a learner's memory."""
    options = []
    if transport != "ipc":  # whose handles are of memory that lies still
        # Micro-batches differ in length, which scatters free memory.
        options.append("expandable_segments:True")
    if tuple(map(int, version("torch").split(".")[:2])) >= (2, 13):  # 2.11 does not know it
        # What learner.offload pins would take the next power of two: up to twice the host memory.
        options.append("pinned_max_round_threshold_mb:64")
    return ",".join(options)


def environment(sharing: int) -> dict[str, str]:
    """Variables of an actor without a GPU. `sharing` actors that work at the same time divide the cores: the ranks
    of a learner, and the roles where rollouts run ahead; otherwise the roles take turns."""
    return {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // sharing)),
        "OMP_WAIT_POLICY": "PASSIVE",  # idle threads must not spin on cores that another role needs
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
