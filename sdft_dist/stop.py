"""Whether a run is asked to stop: by SIGTERM, or because a node of it is about to be taken away."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LOOK_S = 5.0  # how often Ray is asked about draining nodes


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """A function that tells. Needs Ray; takes SIGTERM over in the main thread, until the block's end."""
    # The signal may come while nodes are looked at: each has a flag of its own, which the other cannot undo.
    told, leaving, looked = False, False, time.monotonic()

    def note(number: int, frame: Any) -> None:
        nonlocal told
        told = True

    def asked() -> bool:
        nonlocal leaving, looked
        if not (told or leaving) and time.monotonic() > looked + LOOK_S:
            leaving, looked = bool(leaving_nodes()), time.monotonic()
        return told or leaving

    try:
        before = signal.signal(signal.SIGTERM, note)
    except ValueError:  # not the main thread, where somebody else minds signals
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Until the block's end SIGTERM is what Ctrl-C is. Needs the main thread."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def leaving_nodes() -> set[str]:
    """Ids of nodes that are being drained, as before a preemption, and that this run has actors on."""
    import ray

    state = ray._private.state
    leaving = set(state.state.get_draining_nodes())
    if not leaving:
        return set()
    group = ray.util.get_current_placement_group()
    if group is not None:  # a trial of a sweep, which shares the job with others
        return leaving & set(ray.util.placement_group_table(group)["bundles_to_node_id"].values())
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    mine = state.actors(job_id=job, actor_state_name="ALIVE").values()
    return leaving & {actor["Address"]["NodeID"] for actor in mine}
