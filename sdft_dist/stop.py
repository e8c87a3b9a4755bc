"""Whether work is asked to stop: by SIGTERM, because a node of it is about to be taken away, or as its caller knows."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LOOK_S = 5.0  # how often Ray is asked about draining nodes, and the caller


@contextmanager
def sigterm_told(again: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """A function that tells whether SIGTERM has come; `again` hears of each further one.

    Each call also puts this handler back. So call it as soon as Ray has started, which installs a native handler before
    this one, and when Ray has ended, after which the signal would kill the process. Outside the main thread, whose
    matter signals are, it always says no.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    heard = False

    def note(number: int, frame: Any) -> None:
        nonlocal heard
        if heard:
            again()
        heard = True

    def told() -> bool:
        signal.signal(signal.SIGTERM, note)
        if heard:
            signal.alarm(0)  # by which Ray's native handler would abort the process after three seconds
        return heard

    before = signal.signal(signal.SIGTERM, note)
    from ray._private import utils

    # ray.init would let the signal end it half-way, with processes left behind.
    take, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda handler: None
    try:
        yield told
    finally:
        utils.set_sigterm_handler = take
        signal.signal(signal.SIGTERM, before)


@contextmanager
def asked_to_stop(also: Callable[[], bool] = lambda: False) -> Iterator[Callable[[], bool]]:
    """A function that tells, once and for all; `also` is a reason of the caller's. As for `sigterm_told`, call it
    after Ray has started and ended."""
    # The signal may come while nodes are looked at: it has a flag of its own, which nothing else can undo.
    leaving, looked = False, time.monotonic()

    def asked() -> bool:
        nonlocal leaving, looked
        if not (told() or leaving) and time.monotonic() > looked + LOOK_S:
            leaving, looked = bool(leaving_nodes()) or also(), time.monotonic()
        return told() or leaving

    with sigterm_told() as told:
        yield asked


def leaving_nodes() -> set[str]:
    """Ids of nodes that are being drained, as before a preemption, and that this run is on: this process or actors."""
    import ray

    if not ray.is_initialized():
        return set()
    state = ray._private.state
    leaving = set(state.state.get_draining_nodes())
    if not leaving:
        return set()
    group = ray.util.get_current_placement_group()
    if group is not None:  # a trial of a sweep, which shares the job with others
        return leaving & set(ray.util.placement_group_table(group)["bundles_to_node_id"].values())
    here = ray.get_runtime_context()
    mine = state.actors(job_id=ray.JobID.from_hex(here.get_job_id()), actor_state_name="ALIVE").values()
    return leaving & {here.get_node_id(), *(actor["Address"]["NodeID"] for actor in mine)}
