"""What a run asks of a Ray cluster, where each actor goes, and what is missing there: told before anything starts.
Pure.

A run's actors live in one placement group. Each of its bundles is on one node, and holds one actor, or with
`cluster.colocate` one of each role that shares a GPU.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sdft_dist.config import Config
from sdft_dist.errors import ConfigError
from sdft_dist.types import TransportKind

PLURAL = {"learner": "learner ranks", "generator": "generators", "teacher": "teachers"}
CPU_SHARE = 0.01  # of each actor: Ray places those that ask for nothing at random; too small a share to run out


class Need(NamedTuple):
    """`number` bundles of `gpus` each, which an actor of each of `roles` shares, on nodes that offer `resource`
    where that is given."""

    roles: tuple[str, ...]
    number: int
    gpus: int
    resource: str | None = None

    def __str__(self) -> str:
        return f"{' + '.join(PLURAL[role] for role in self.roles)} {self.number} × {self.gpus}"


def roles_of(config: Config) -> set[str]:
    """What a run is made of."""
    sdft = config.method == "sdft"
    return {"learner"} | ({"generator"} if sdft or config.eval.every else set()) | ({"teacher"} if sdft else set())


class Size(NamedTuple):
    """Of a role: its actors, and the GPUs of each."""

    actors: int
    gpus: int


def sizes(config: Config) -> dict[str, Size]:
    """Of each role that a run may have."""
    cluster = config.cluster
    return {
        "learner": Size(config.learner.ranks, 1),
        "generator": Size(cluster.generators, cluster.generator_tensor_parallel),
        "teacher": Size(cluster.teachers, cluster.teacher_tensor_parallel),
    }


def num_gpus(wanted: Sequence[Need]) -> int:
    """That all bundles take together."""
    return sum(need.number * need.gpus for need in wanted)


def needs(config: Config, device: str, roles: Collection[str] | None = None) -> list[Need]:
    """The bundles on `device` ("cuda" or "cpu") of these roles, or of all that the run is made of."""
    cluster, there = config.cluster, roles_of(config) if roles is None else set(roles)
    shared = {"none": (), "teachers": ("generator", "teacher"), "all": tuple(PLURAL)}[cluster.colocate]
    groups = [tuple(r for r in shared if r in there), *((r,) for r in PLURAL if r in there and r not in shared)]
    found = []
    for group in groups:
        if group:
            number, gpus = sizes(config)[group[0]]
            pinned = f"sdft_{group[0]}" if cluster.pin_roles else None
            found.append(Need(group, number, gpus if device == "cuda" else 0, pinned))
    return sorted(found, key=lambda need: list(PLURAL).index(need.roles[0]))


def bundles(wanted: Sequence[Need]) -> list[dict[str, float]]:
    """The placement group's bundles: those of the first need, then those of the next, …"""
    return [
        {
            **({"GPU": need.gpus} if need.gpus else {}),
            "CPU": CPU_SHARE * len(need.roles),
            **({need.resource: 0.001} if need.resource else {}),
        }
        for need in wanted
        for _ in range(need.number)
    ]


def push_transport(config: Config, device: str) -> TransportKind:
    """How weights travel from the learner's rank 0 to the engines. Raises ConfigError where `cluster.push_transport`
    asks for what cannot be."""
    cluster, wanted = config.cluster, config.cluster.push_transport
    shared = device == "cuda" and cluster.colocate == "all"
    alone = config.learner.ranks == 1 and max(cluster.generator_tensor_parallel, cluster.teacher_tensor_parallel) == 1
    if wanted == "nccl" and (device == "cpu" or shared):
        raise ConfigError("cluster.push_transport: nccl needs GPUs that the learner shares with no engine: use auto")
    if wanted == "ipc" and device == "cuda" and not (shared and alone):
        raise ConfigError(
            "cluster.push_transport: ipc needs one GPU that holds all roles (cluster.colocate=all, learner.ranks=1): "
            "use auto"
        )
    if wanted != "auto":
        return wanted
    if device == "cpu":
        return "gloo"
    if not shared:
        return "nccl"
    return "ipc" if alone else "gloo"


class Spot(NamedTuple):
    """Where an actor goes, and what it takes of its bundle, besides CPU_SHARE."""

    bundle: int
    gpus: float


def spot_of(wanted: Sequence[Need], role: str, index: int) -> Spot:
    """Of actor `index` of a role. Several roles take equal shares of a GPU."""
    start = 0
    for need in wanted:
        if role in need.roles:
            share = 1 if len(need.roles) == 1 else int(10_000 / len(need.roles)) / 10_000  # Ray counts to four digits
            return Spot(start + index, need.gpus * share)
        start += need.number
    raise KeyError(role)


def placed_on(wanted: Sequence[Need], homes: Iterable[str]) -> str:
    """Where each role is, by the node of each bundle in `homes`."""
    nodes, parts = iter(homes), []
    for need in wanted:
        counts = Counter(itertools.islice(nodes, need.number))
        where = ", ".join(f"{number} on {node}" for node, number in counts.items())
        parts.append(f"{' + '.join(PLURAL[role] for role in need.roles)}: {where}")
    return "; ".join(parts)


def lacking(wanted: Sequence[Need], nodes: Sequence[Mapping[str, Any]]) -> str | None:
    """What a cluster with such nodes (as `ray.nodes()` tells of them) is short of; None where all actors fit."""
    offers = sorted(
        (dict(node["Resources"]) for node in nodes if node.get("Alive")), key=lambda offer: -offer.get("GPU", 0)
    )
    total = sum(offer.get("GPU", 0) for offer in offers)
    for need in sorted(wanted, key=lambda need: -need.gpus):
        mine = [offer for offer in offers if need.resource is None or need.resource in offer]
        if not mine and need.resource:
            return f"no node offers {need.resource}, which cluster.pin_roles asks for {PLURAL[need.roles[0]]}"
        for _ in range(need.number):
            home = next((offer for offer in mine if offer.get("GPU", 0) >= need.gpus), None)
            if home is None:
                return _shortage(wanted, need, total, len(offers), sum(offer.get("GPU", 0) for offer in mine))
            home["GPU"] = home.get("GPU", 0) - need.gpus
    return None


def _shortage(wanted: Sequence[Need], need: Need, total: float, nodes: int, left: float) -> str:
    parts = ", ".join(str(n) for n in wanted if n.gpus)
    together = f", {need.gpus} of them on one node" if need.gpus > 1 else ""
    where = f"; {left:g} are left for {PLURAL[need.roles[0]]}" if need.resource or need.gpus > 1 else ""
    return f"needs {num_gpus(wanted)} GPUs ({parts}){together}, the cluster has {total:g} on {nodes} nodes{where}"
