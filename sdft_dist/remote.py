"""Waiting for Ray actors: the driver's one event loop.

Whoever waits for some results lets all other results be handled meanwhile, so rollouts keep streaming
to the teachers while the driver waits for the learner. One thread, no locks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from sdft_dist.errors import OURS, Preempted

Handler = Callable[[Any], None]
LOOK_S = 1.0  # how often a wait looks whether the run was asked to stop


class Events:
    """Object references under way, and what to do with their results. `stop` says whether the run was
    asked to stop; no wait goes on for longer than `grace_s` after that."""

    def __init__(self, stop: Callable[[], bool] = lambda: False, grace_s: float = math.inf) -> None:
        self._handlers: dict[Any, tuple[Handler, Handler]] = {}
        self._stop, self._grace_s = stop, grace_s
        self._stop_by = math.inf

    def on(self, ref: Any, handler: Handler, failed: Handler | None = None) -> None:
        """Call `handler(result)` when `ref` is there, or `failed(error)`. Without `failed` the error is
        raised by whoever waits then."""
        self._handlers[ref] = (handler, failed or _raise)

    def wait_all(self, refs: Sequence[Any], *, timeout_s: float, what: str, may_stop: bool = False) -> list[Any]:
        """Results of `refs`, in order. With `may_stop`, raises Preempted when the run was asked to stop.

        Raises the first failure without waiting for the rest, which in a collective may wait for ever for the one that
        failed; a note names them. Raises TimeoutError that names `what` after `timeout_s` seconds, or `grace_s` after
        the run was asked to stop.
        """
        import ray

        waiting, deadline = set(refs), time.monotonic() + timeout_s

        def silent() -> str:
            if len(refs) == 1:
                return ""
            missing = ", ".join(str(i) for i, ref in enumerate(refs) if ref in waiting)
            return f" from {missing} of 0 … {len(refs) - 1}"

        while waiting:
            if may_stop and self._stop():
                raise Preempted("asked to stop")
            ready = self._next(list(waiting | self._handlers.keys()), deadline)
            if ready is None and time.monotonic() < min(deadline, self._patience()):
                continue
            if ready is None:
                asked = time.monotonic() < deadline
                waited = f"{self._grace_s:g} s after being asked to stop" if asked else f"in {timeout_s:g} s"
                advice = "" if asked else "; where the work takes that long, raise cluster.timeout_s"
                raise TimeoutError(f"{what}: no answer {waited}{silent()}{advice}")
            waiting.discard(ready)
            try:
                self._handle(ready)
            except Exception as error:
                error.add_note(f"asked for: {what}" + (f": no answer yet{silent()}" if waiting else ""))
                raise
        return list(ray.get(list(refs)))

    def run_until(self, done: Callable[[], bool], *, timeout_s: float, who: Callable[[], str]) -> None:
        """Handle results until `done()`. Raises TimeoutError with `who()` when nothing at all has come
        for `timeout_s` seconds, and Preempted when the run was asked to stop."""
        deadline = time.monotonic() + timeout_s
        while not done():
            if self._stop():
                raise Preempted("asked to stop")
            ready = self._next(list(self._handlers), deadline)
            if ready is not None:
                self._handle(ready)
                deadline = time.monotonic() + timeout_s
            elif time.monotonic() >= deadline or not self._handlers:
                raise TimeoutError(f"nothing came for {timeout_s:g} s (cluster.timeout_s): {who()}")

    def _handle(self, ref: Any) -> None:
        import ray

        handler, failed = self._handlers.pop(ref, (_ignore, _raise))
        try:
            result = ray.get(ref)
        except ray.exceptions.RayTaskError as error:  # whatever an actor raised
            failed(error.cause if isinstance(error.cause, OURS) else error)
            return
        except Exception as error:  # its death
            failed(error)
            return
        handler(result)

    def _next(self, refs: list[Any], deadline: float) -> Any | None:
        import ray

        if not refs:
            return None
        ready, _ = ray.wait(refs, num_returns=1, timeout=max(0.0, min(LOOK_S, deadline - time.monotonic())))
        return ready[0] if ready else None

    def _patience(self) -> float:
        """Until when the run may go on, once it was asked to stop."""
        if self._stop_by == math.inf and self._stop():
            self._stop_by = time.monotonic() + self._grace_s
        return self._stop_by


def _ignore(result: Any) -> None:
    pass


def _raise(error: Exception) -> None:
    raise error
