"""Ray for as long as a command runs: a cluster that is joined, or a local one; and the device that actors use."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sdft_dist.config import Config
from sdft_dist.errors import Fault, UserError, brief

REACH_S = 20.0  # for a head to answer
LOOK_S = 2.0  # between two looks whether it still does
OWN = "sdft_own"  # a resource of a Ray that ends with the command that started it
RAYS_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Join `cluster.address`, or start a local Ray that ends with the block. Raises UserError where the address or the
    place for Ray's files is wrong, Fault where this machine does not start a Ray in time."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; it warns without
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if config.cluster.address is None:
        # A port of the dashboard without a token is remote code execution (CVE-2023-48022).
        options |= {"include_dashboard": False, "resources": {OWN: 1}}
        if resolve_device(config) == "cpu":  # on GPUs Ray's own choice: states of a large model take gigabytes
            options["object_store_memory"] = 1 << 30
    else:
        _reach(config.cluster.address)
    # Without "local", Ray would join a cluster that somebody has started on this machine.
    try:
        ray.init(address=config.cluster.address or "local", **options)
    except Exception as e:
        explained = _why_not(config.cluster.address, e)
        if explained is None:
            raise
        raise explained from e
    if config.cluster.address is not None and OWN in ray.cluster_resources():
        ray.shutdown()
        raise UserError(
            f"cluster.address: {config.cluster.address}: the Ray there is another command's own, and ends with it: "
            "give the cluster's HOST:PORT, start one with `ray start --head`, or leave cluster.address out"
        )
    ended = threading.Event()
    threading.Thread(target=_watch_head, args=(ray.get_runtime_context().gcs_address, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        ray.shutdown()


def _why_not(address: str | None, error: Exception) -> Exception | None:
    """Ray's error as the user's or the machine's; None where it is neither."""
    from ray.exceptions import AuthenticationError

    if "AF_UNIX path length" in str(error):
        return UserError(f"TMPDIR: set RAY_TMPDIR to a shorter folder, as /tmp/ray-$USER, for Ray: {brief(error)}")
    if address is None:
        if isinstance(error, ConnectionError) or "timed out during startup" in str(error):  # without a type of its own
            return Fault(f"Ray did not start on this machine, which may have too much to do: {brief(error)}; try again")
    elif isinstance(error, ConnectionError | AuthenticationError):
        # With a given address Ray takes no token by itself, and says of a wrong or missing one that it cannot connect.
        return UserError(
            f"cluster.address: {address}: {brief(error)}; is `ray start` done here? Where the cluster wants "
            "a token, as it does if there was one at its start, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to it"
        )
    return None


def _watch_head(address: str, ended: threading.Event) -> None:
    """End this process, as a machine's failure does, where the head at HOST:PORT has not answered for nearly as long as
    Ray waits for it. Then Ray would end it with exit code 1, whatever it does: calls that wait for the head wait for
    ever."""
    host, _, port = address.rpartition(":")
    patience_s = max(3 * LOOK_S, float(os.environ.get(RAYS_PATIENCE, "60")) - 3 * LOOK_S)
    heard = time.monotonic()
    while not ended.wait(LOOK_S):
        with suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), timeout=LOOK_S).close()
            heard = time.monotonic()
        if time.monotonic() - heard > patience_s:
            print(
                f"sdft: error: Ray's head at {address} has not answered for {patience_s:.0f} s: start the cluster "
                "again; a run goes on from its newest checkpoint with --resume auto",
                file=sys.stderr,
                flush=True,
            )
            os._exit(4)


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
