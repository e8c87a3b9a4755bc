"""What a run asks of a Ray cluster, and what is missing there: told before anything starts. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sdft_dist.config import Config


class Need(NamedTuple):
    """`actors` of a role, each with as many GPUs of one node, which offers `resource` where that is given."""

    role: str
    actors: int
    gpus: float
    resource: str | None = None


def resource(config: Config, role: str) -> str | None:
    """Ray's custom resource that nodes for a role ("learner", "generator" or "teacher") offer, with
    `cluster.pin_roles`."""
    return f"sdft_{role}" if config.cluster.pin_roles else None


def needs(config: Config, device: str) -> list[Need]:
    """The actors of a run on `device` ("cuda" or "cpu")."""
    sdft, cluster, gpus = config.method == "sdft", config.cluster, float(device == "cuda")
    found = [Need("learner ranks", config.learner.ranks, gpus, resource(config, "learner"))]
    if sdft or config.eval.every:
        found.append(Need("generators", cluster.generators, gpus, resource(config, "generator")))
    if sdft:
        found.append(Need("teachers", cluster.teachers, gpus, resource(config, "teacher")))
    return found


def lacking(wanted: Sequence[Need], nodes: Sequence[Mapping[str, Any]]) -> str | None:
    """What a cluster with such nodes (as `ray.nodes()` tells of them) is short of; None where all actors fit."""
    offers = sorted(
        (dict(node["Resources"]) for node in nodes if node.get("Alive")), key=lambda offer: -offer.get("GPU", 0)
    )
    total = sum(offer.get("GPU", 0) for offer in offers)
    for need in sorted(wanted, key=lambda need: -need.gpus):
        mine = [offer for offer in offers if need.resource is None or need.resource in offer]
        if not mine:
            return f"no node offers {need.resource}, which cluster.pin_roles asks for {need.role}"
        for _ in range(need.actors):
            place = next((offer for offer in mine if offer.get("GPU", 0) >= need.gpus), None)
            if place is None:
                parts = ", ".join(f"{n.role} {n.actors} × {n.gpus:g}" for n in wanted if n.gpus)
                asked = sum(n.actors * n.gpus for n in wanted)
                where = f"; {sum(o.get('GPU', 0) for o in mine):g} are left for {need.role}" if need.resource else ""
                return f"needs {asked:g} GPUs ({parts}), the cluster has {total:g} on {len(offers)} nodes{where}"
            place["GPU"] = place.get("GPU", 0) - need.gpus
    return None
