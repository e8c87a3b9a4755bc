"""Waiting for Ray actors: the driver's one event loop.

Whoever waits for some results lets all other results be handled meanwhile, so rollouts keep streaming
to the teachers while the driver waits for the learner. One thread, no locks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from sdft_dist.types import Piece

Handler = Callable[[Any], None]


class Events:
    """Object references under way, and what to do with their results."""

    def __init__(self) -> None:
        self._handlers: dict[Any, Handler] = {}

    def on(self, ref: Any, handler: Handler) -> None:
        """Call `handler(result)` when `ref` is there. Its error is raised by whoever waits then."""
        self._handlers[ref] = handler

    def wait_all(self, refs: Sequence[Any], *, timeout_s: float, what: str) -> list[Any]:
        """Results of `refs`, in order.

        Raises the first failure without waiting for the rest: in a collective, the others wait for the
        one that failed. Raises TimeoutError that names `what` after `timeout_s` seconds.
        """
        import ray

        waiting, deadline = set(refs), time.monotonic() + timeout_s
        while waiting:
            ready = self._next(list(waiting | self._handlers.keys()), deadline)
            if ready is None:
                raise TimeoutError(f"{what}: {len(waiting)} of {len(refs)} workers gave no answer in {timeout_s:g} s")
            waiting.discard(ready)
            self._handle(ready)
        return list(ray.get(list(refs)))

    def run_until(self, done: Callable[[], bool], *, timeout_s: float, who: Callable[[], str]) -> None:
        """Handle results until `done()`. Raises TimeoutError with `who()` when nothing at all has come
        for `timeout_s` seconds."""
        while not done():
            ready = self._next(list(self._handlers), time.monotonic() + timeout_s)
            if ready is None:
                raise TimeoutError(f"nothing came for {timeout_s:g} s: {who()}")
            self._handle(ready)

    def _handle(self, ref: Any) -> None:
        import ray

        result, handler = ray.get(ref), self._handlers.pop(ref, None)
        if handler is not None:
            handler(result)

    def _next(self, refs: list[Any], deadline: float) -> Any | None:
        import ray

        if not refs:
            return None
        ready, _ = ray.wait(refs, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        return ready[0] if ready else None


def fetch(pieces: Sequence[Piece]) -> list[Any]:
    """The records that `pieces` name, in order; each object is fetched once."""
    import ray

    refs = list(dict.fromkeys(piece.ref for piece in pieces))
    objects = dict(zip(refs, ray.get(refs), strict=True))
    return [objects[piece.ref][piece.row] for piece in pieces]
