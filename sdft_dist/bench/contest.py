"""`sdft bench`: SDFT beside SFT, and beside TRL's trainer or itself on-policy, in one run, taking turns.

All contestants stand ready at once and work in segments of some steps, one after the other, so that a
slow minute of the machine hits all of them. The headline is the median over the segments of
(machine-seconds per sample of SDFT) / (those of SFT): every device counts that a method uses.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdft_dist.bench.contestants import Contestant, Ours, contestant
from sdft_dist.bench.figures import SKIPPED, figures
from sdft_dist.config import Config
from sdft_dist.errors import UserError
from sdft_dist.report.charts import timeline
from sdft_dist.session import ray_session, resolve_device
from sdft_dist.topology import lacking, needs


class Turns:
    """Lets the contestants' threads work one at a time, a segment each, and notes every step's end."""

    def __init__(self, names: Sequence[str], segment: int, num_steps: int) -> None:
        self.ends: dict[str, list[list[float]]] = {name: [] for name in names}
        self._names, self._segment, self._num_steps = list(names), segment, num_steps
        self._now, self._left = 0, set(names)
        self._changed = threading.Condition()
        self.error: Exception | None = None

    def after_step(self, name: str) -> Callable[[int], None]:
        """The callback of one contestant."""

        def act(step: int) -> None:
            if step:
                self.ends[name][-1].append(time.perf_counter())
            if step % self._segment == 0 and step != self._num_steps:
                if step:
                    self._pass_on()
                self._await(name)
                self.ends[name].append([time.perf_counter()])

        return act

    def run(self, contestants: Sequence[Contestant]) -> None:
        """All contestants to their end. Raises the first one's error."""
        threads = [threading.Thread(target=self._guard, args=(c,), daemon=True) for c in contestants]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _guard(self, contestant: Contestant) -> None:
        # Consumes its turns, produces `ends`, waits in `_await`, unblocked by `_pass_on` or an error.
        try:
            self._await(contestant.name)  # also to start: one engine at a time is loaded
            contestant(self._num_steps, self.after_step(contestant.name))
        except Exception as e:  # raised by `run`, in the thread that waits for all
            self.error = self.error or e
        finally:
            with self._changed:
                self._left.discard(contestant.name)
            self._pass_on()

    def _await(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.error is not None or self._names[self._now] == name)
        if self.error is not None:
            raise RuntimeError("another contestant failed")

    def _pass_on(self) -> None:
        with self._changed:
            for _ in self._names:
                self._now = (self._now + 1) % len(self._names)
                if self._names[self._now] in self._left:
                    break
            self._changed.notify_all()


def bench(config: Config, out: Path, *, pairs: int, segment: int, fixed: bool, peer: str | None) -> dict[str, Any]:
    """Measure and return the report, which is also written to `out/bench.json` with a picture beside it.

    `fixed` runs every completion to `rollout.max_completion_tokens`. Raises UserError as a run would.
    """
    out.mkdir(parents=True, exist_ok=True)
    least = max(SKIPPED + 2, config.rollout.max_staleness + 1)
    if segment < least:
        raise UserError(f"--segment: {segment} steps are too few: give {least}, of which {SKIPPED} are not counted")
    contestants: list[Any] = [contestant(config, method, out, fixed=fixed) for method in ("sdft", "sft")]
    if peer == "sync":
        on_policy = contestants[0].config.changed(rollout={"max_staleness": 0})
        contestants.append(replace(contestants[0], name="sync", config=on_policy, folder=out / "sync", machines=[]))
    if peer == "trl":
        from sdft_dist.bench.peer import Trl

        inputs = contestants[0].inputs
        contestants.append(
            Trl(config=config, tokenizer=inputs.tokenizer, rows=inputs.rows, fixed=fixed, folder=out / "trl")
        )
    # Not counted are the first segment of each, which warms up, and the last, whose rollouts end early.
    turns = Turns([c.name for c in contestants], segment, segment * (pairs + 2))
    with ray_session(config):
        _refuse_too_few_gpus([c.config for c in contestants if isinstance(c, Ours)])
        turns.run(contestants)
    report = figures(config, turns.ends, contestants[:2], out, fixed)
    (out / "bench.json").write_text(json.dumps(report, indent=2) + "\n")
    timeline(out / "sdft" / "trace.json", out / "timeline.png")
    return report


def _refuse_too_few_gpus(configs: Sequence[Config]) -> None:
    """Raises UserError where the contestants, which all stay while they take turns, do not fit beside each other."""
    import ray

    wanted = [need for config in configs for need in needs(config, resolve_device(config))]
    if missing := lacking(wanted, ray.nodes()):
        raise UserError(
            f"bench: SDFT and SFT take turns, and each keeps its GPUs: {missing}; with fewer, measure a role at a "
            "time (--learner-only, with method=sft too, --generator-only, --teacher-only)"
        )
