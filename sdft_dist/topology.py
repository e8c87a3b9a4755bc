"""What a run asks of a Ray cluster, and what is missing there: told before anything starts. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sdft_dist.config import Config


class Need(NamedTuple):
    """`actors` of a role, each with as many GPUs of one node."""

    role: str
    actors: int
    gpus: float


def needs(config: Config, device: str) -> list[Need]:
    """The actors of a run on `device` ("cuda" or "cpu")."""
    sdft, cluster, gpus = config.method == "sdft", config.cluster, float(device == "cuda")
    found = [Need("learner ranks", config.learner.ranks, gpus)]
    if sdft or config.eval.every:
        found.append(Need("generators", cluster.generators, gpus))
    if sdft:
        found.append(Need("teachers", cluster.teachers, gpus))
    return found


def lacking(wanted: Sequence[Need], nodes: Sequence[Mapping[str, Any]]) -> str | None:
    """What a cluster with such nodes (as `ray.nodes()` tells of them) is short of; None where all actors fit."""
    alive = [node for node in nodes if node.get("Alive")]
    free = sorted((float(node["Resources"].get("GPU", 0)) for node in alive), reverse=True)
    total, asked = sum(free), sum(need.actors * need.gpus for need in wanted)
    for need in sorted(wanted, key=lambda need: -need.gpus):
        for _ in range(need.actors):
            place = next((i for i, gpus in enumerate(free) if gpus >= need.gpus), None)
            if place is None:
                parts = ", ".join(f"{n.actors} {n.role} of {n.gpus:g}" for n in wanted if n.gpus)
                return f"needs {asked:g} GPUs ({parts}), the cluster has {total:g} on {len(alive)} nodes"
            free[place] -= need.gpus
    return None
