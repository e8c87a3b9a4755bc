"""The driver's handle on all learner ranks.

Plans micro-batches from lengths, calls every rank at once, and drives weight pushes together with
the receiving pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from learner.microbatch import trained_tokens
from learner.roofline import Roofline
from learner.tally import Tally
from sdft_dist.batching import pack
from sdft_dist.config import Config
from sdft_dist.errors import NotServing, UserError
from sdft_dist.remote import Events
from sdft_dist.types import OnSpan, ShardFile, Span, TrainItem, TransportKind, WeightManifest
from sdft_dist.wire import bucket_bytes

SLOW_DISK = 50e6  # bytes/s at which a checkpoint may be written, however short `cluster.timeout_s` is


class Receivers(Protocol):
    """What a push needs of a pool of engines."""

    role: str
    actors: list[Any]
    workers: int
    transport: TransportKind
    lost: dict[int, str]

    def look(self, *, busy_too: bool) -> None: ...
    def join_push(self, host: str, port: int, keep: str | None) -> list[Any]: ...
    def receive(self, manifest: WeightManifest) -> list[Any]: ...
    def push_failed(self, index: int, actor: Any, error: Exception) -> None: ...


class LearnerGroup:
    """All ranks; one method call here is one collective."""

    def __init__(self, config: Config, ranks: Sequence[Any], events: Events, on_span: OnSpan) -> None:
        self.config, self.ranks, self._events, self._on_span = config, list(ranks), events, on_span
        self._manifests: dict[bool, WeightManifest] = {}  # of whole pushes, and of what is trained
        self._state_bytes = 0
        self._pushed = 0  # bytes, since the last update
        self._whole: set[str] = set()  # roles whose receivers hold the weights that are not trained

    def start(self, resume: Path | None = None) -> None:
        """Build the process group, the model and the optimizer on all ranks, from the checkpoint in
        `resume` where one is given. Raises Preempted when the run was asked to stop."""
        wait = partial(self._events.wait_all, timeout_s=self.config.cluster.start_timeout_s, may_stop=True)
        ((host, port),) = wait([self.ranks[0].address.remote()], what="learner address")
        folder = None if resume is None else str(resume)
        wait([rank.start.remote(host, port, folder) for rank in self.ranks], what="learner start")

    def update(self, step: int, num_steps: int, items: Sequence[TrainItem]) -> dict[str, Any]:
        """One optimizer step on `items`. Returns the step's metrics, over all ranks."""
        ranks = len(self.ranks)
        trained = [trained_tokens(item.num_completion_tokens, self.config) for item in items]
        plan = pack(
            [item.num_tokens for item in items], num_ranks=ranks, budget=self.config.learner.tokens_per_microbatch
        )
        total_tokens, total_sequences = sum(trained), sum(n > 0 for n in trained)
        refs = [
            rank.update.remote(step, num_steps, [[items[i] for i in m] for m in mine], total_tokens, total_sequences)
            for rank, mine in zip(self.ranks, plan, strict=True)
        ]
        per_rank = self._wait(refs, f"learner update of step {step}")
        for rank, found in enumerate(per_rank):
            for span in found.spans:
                self._on_span("learner", rank, span)
        tally = sum((m.tally for m in per_rank), Tally())
        pushed, self._pushed = self._pushed, 0
        metrics, rollout = tally.metrics(), self.config.rollout
        # Sampled under another prompt, or among fewer tokens: that is what would be seen.
        if rollout.from_teacher or rollout.top_p < 1 or rollout.top_k:
            metrics = {name: value for name, value in metrics.items() if not name.startswith("logprob_difference")}
        return {
            **metrics,
            "grad_norm": per_rank[0].grad_norm,
            "learning_rate": per_rank[0].learning_rate,
            "pushed_mib": pushed / 2**20,  # to all engines, before this step
            # What free slots and waiting for the fullest rank cost.
            "padding_share": 1 - sum(item.num_tokens for item in items) / (ranks * max(m.slots for m in per_rank)),
        }

    def logprobs(
        self, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray], temperature: float
    ) -> list[np.ndarray]:
        """The student's log-probs, float32 [C] each, of completions after prompts; nothing is trained."""
        lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
        (plan,) = pack(lengths, num_ranks=1, budget=self.config.learner.tokens_per_microbatch)
        out: list[np.ndarray] = [np.zeros(0)] * len(lengths)
        for micro_batch in plan:
            pairs = [(prompts[i], completions[i]) for i in micro_batch]
            for i, found in zip(micro_batch, self._all("logprobs", pairs, temperature)[0], strict=True):
                out[i] = found
        return out

    def open_push(self, receivers: Receivers) -> None:
        """Build the push group of rank 0 and all receivers, in the place of an earlier one."""
        self._whole.discard(receivers.role)
        opened = self._all("open_push", receivers.role, len(receivers.actors) * receivers.workers, receivers.transport)
        host, port = next(address for address in opened if address is not None)
        keep = None
        if receivers.role == "teachers" and self.config.loss.support != "full":
            (keep,) = self._wait([self.ranks[0].head_name.remote()], "learner head name")
        joining = receivers.join_push(host, port, keep)
        connecting = [r.connect_push.remote(receivers.role) for r in self.ranks]
        self._wait([*connecting, *joining], f"connecting to the {receivers.role}")

    def push(self, receivers: Receivers, version: int, oldest_in_flight: int, *, wait: bool = False) -> None:
        """Send the weights that `receivers` serve. Returns when the ranks have handed them over, or with
        `wait` when all receivers have loaded them whole; work sent to a receiver afterwards finds them.

        Targets of teachers older than `oldest_in_flight` must not come any more. Without `wait`, a
        receiver's failure is noted by `receivers`.
        """
        if receivers.transport == "nccl":  # a broadcast to one that is gone never ends
            receivers.look(busy_too=False)
            if receivers.lost:
                if wait:
                    raise NotServing(f"{receivers.role} before a push: {receivers.lost}")
                return
        whole = receivers.role not in self._whole
        if whole not in self._manifests:
            (self._manifests[whole],) = self._wait([self.ranks[0].manifest.remote(version, whole)], "learner manifest")
        self._pushed += len(receivers.actors) * sum(map(bucket_bytes, self._manifests[whole].buckets))
        receiving = receivers.receive(replace(self._manifests[whole], version=version))
        sending = [r.push.remote(receivers.role, version, whole, oldest_in_flight) for r in self.ranks]
        if self.config.model.lora.rank:
            self._whole.add(receivers.role)
        for i, (ref, actor) in enumerate(zip(receiving, receivers.actors, strict=True)):
            failed = None if wait else partial(receivers.push_failed, i, actor)
            self._events.on(ref, partial(self._received, receivers.role, i), failed)
        what = f"push of version {version} to the {receivers.role}"
        for rank, span in enumerate(self._wait(sending, what)):
            self._on_span("learner", rank, span)
        if wait:
            self._wait(receiving, what)

    def _received(self, role: str, index: int, spans: Sequence[Span]) -> None:
        for span in spans:
            self._on_span(role.removesuffix("s"), index, span)

    def must_see(self, path: Path) -> None:
        """Raises UserError where a rank does not see that file of the run directory, in which it shall write."""
        blind = [rank for rank, sees in enumerate(self._all("sees", str(path))) if not sees]
        if blind:
            raise UserError(
                f"run_dir: {path.parent} is not there for learner ranks {', '.join(map(str, blind))}: give a folder on "
                "a file system that all nodes share"
            )

    def state_bytes(self) -> int:
        """Size of a checkpoint."""
        self._state_bytes = sum(self._all("state_bytes"))
        return self._state_bytes

    def start_saving(self, folder: Path) -> None:
        """Copy the state and begin to write its shards into `folder`, while training goes on; or write them, where the
        optimizer is in host memory."""
        self._all("start_saving", str(folder), timeout_s=self._saving_limit())

    def finish_saving(self, *, wait: bool) -> list[ShardFile] | None:
        """The files of the checkpoint; None while some are being written and `wait` is false. Raises what
        writing raised."""
        files = self._all("finish_saving", wait, timeout_s=self._saving_limit())
        return None if None in files else [file for own in files for file in own]

    def _saving_limit(self) -> float:
        return max(self.config.cluster.timeout_s, self._state_bytes / SLOW_DISK)

    def roofline(self) -> Roofline:
        """What the device of rank 0 reaches."""
        (found,) = self._wait([self.ranks[0].roofline.remote()], "learner roofline")
        return found

    def peak_gib(self) -> float:
        """Peak memory of the rank that has needed most."""
        return max(self._all("peak_gib"))

    def stop(self) -> None:
        """End the ranks' process group."""
        self._all("stop")

    def _all(self, method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        return self._wait([getattr(rank, method).remote(*args) for rank in self.ranks], f"learner {method}", timeout_s)

    def _wait(self, refs: list[Any], what: str, timeout_s: float | None = None) -> list[Any]:
        return self._events.wait_all(refs, timeout_s=timeout_s or self.config.cluster.timeout_s, what=what)
