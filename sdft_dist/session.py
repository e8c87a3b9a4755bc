"""Ray for as long as a command runs: a cluster that is joined, or a local one; and the device that actors use."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sdft_dist.config import Config
from sdft_dist.errors import UserError

REACH_S = 20.0  # for a head to answer


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Join `cluster.address`, or start a local Ray that ends with the block."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; it warns without
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if config.cluster.address is None:
        # A port of the dashboard without a token is remote code execution (CVE-2023-48022).
        options["include_dashboard"] = False
        if resolve_device(config) == "cpu":  # on GPUs Ray's own choice: states of a large model take gigabytes
            options["object_store_memory"] = 1 << 30
    else:
        _reach(config.cluster.address)
    # Without "local", Ray would join a cluster that somebody has started on this machine.
    ray.init(address=config.cluster.address or "local", **options)
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raises UserError where nobody answers at HOST:PORT, for which Ray would wait without a word, and for a
    connection through Ray's client, which knows nothing of the cluster's nodes."""
    if address.startswith("ray://"):
        raise UserError(f"cluster.address: got {address}: give the head's HOST:PORT, on a node of the cluster")
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return  # "auto", which Ray resolves
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except OSError as e:
        raise UserError(f"cluster.address: nobody answers at {address}: {e}; is `ray start --head` done there?") from e


def resolve_device(config: Config) -> str:
    """ "cuda" or "cpu"."""
    if config.cluster.device != "auto":
        return config.cluster.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
