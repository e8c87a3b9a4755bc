"""Waiting for Ray actors: all results in order, or the first failure as soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any


def wait_all(refs: Sequence[Any], *, timeout_s: float, what: str) -> list[Any]:
    """Results of `refs`, in order.

    Raises the first failure without waiting for the rest: in a collective, the others wait for the
    one that failed. Raises TimeoutError that names `what` after `timeout_s` seconds.
    """
    import ray

    waiting, deadline = list(refs), time.monotonic() + timeout_s
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"{what}: {len(waiting)} of {len(refs)} workers gave no answer in {timeout_s:g} s")
        ray.get(ready)
    return list(ray.get(list(refs)))
