"""One learner rank: a Ray actor's class, without Ray.

Methods that train, push or save are collectives: the driver calls them on all ranks at once. Others answer for this
rank alone.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learner import checkpoint
from learner.ema import Ema
from learner.fused import Kind, Objective
from learner.lora import attach
from learner.microbatch import TrainSequence, build, token_weight
from learner.model import ONE_ROW, Student, check_head, check_packing, load_causal_lm, tune
from learner.objective import divergence
from learner.push import Sender, WeightSource, ema_source, manifest, push, student_source, together
from learner.roofline import Roofline, measure
from learner.schedule import learning_rate
from learner.tally import RankMetrics, Tally, done
from learner.zero import (
    add_gradients_directly,
    deepspeed_config,
    fragments,
    make_optimizer_state,
    optimizer_step,
    set_timeouts,
    step_and_norm,
)
from sdft_dist.batching import one_after_another, rows
from sdft_dist.config import Config, LossConfig
from sdft_dist.errors import UserError
from sdft_dist.logits import LogitTransform, logit_transform
from sdft_dist.memory import own_peak_gib
from sdft_dist.pieces import fetch
from sdft_dist.types import Sample, ShardFile, Span, TeacherTargets, TrainItem, TransportKind, WeightManifest


class LearnerRank:
    """Holds the student, its optimizer and its EMA; all sharded by DeepSpeed."""

    def __init__(self, config: Config, rank: int, world_size: int, device: str, vocab_size: int, problems: Any):
        self.config, self.rank, self.world_size, self.problems = config, rank, world_size, problems
        self.device = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
        self.vocab_size = vocab_size
        self._senders: dict[str, Sender] = {}
        # With the optimizer in host memory there may be no room for a copy of it.
        self._writer = checkpoint.ShardWriter(in_parts=config.learner.offload == "optimizer")
        self._teacher_heads: dict[int, torch.Tensor] = {}

    def address(self) -> tuple[str, int]:
        """This node's address and a free port, for the process group's rendezvous."""
        import ray

        return ray.util.get_node_ip_address(), _free_port()

    def start(self, host: str, port: int, resume: str | None) -> None:
        """Join the process group, load the model, build optimizer and EMA; from the checkpoint in the
        folder `resume`, where one is given."""
        self._join_ranks(host, port)
        shards = checkpoint.Shards(Path(resume)) if resume else None
        self._load_student(shards)
        self._initialize_engine()
        self._moved = shards is not None  # whether the student has left the weights at model.path
        self.ema, anchor = None, checkpoint.anchor(self.config, shards)
        if self.config.teacher.kind == "ema":
            self.ema = Ema(self._fragments(), None if anchor is None else self._weights_of(anchor))
        if shards is not None:
            self._restore(shards, anchored=anchor is not None)

    def _join_ranks(self, host: str, port: int) -> None:
        """The process group of all ranks, and what this process needs before it computes."""
        os.environ.update(
            MASTER_ADDR=host,
            MASTER_PORT=str(port),
            RANK=str(self.rank),
            LOCAL_RANK="0",
            WORLD_SIZE=str(self.world_size),
            DS_ACCELERATOR=self.device.type,
        )
        import deepspeed

        # Compiled at run time under a file lock, which a killed rank leaves behind: later runs would wait for
        # ever. It serves DeepSpeed's inference only.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=0.8 * self.config.cluster.start_timeout_s)
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
        torch.manual_seed(self.config.seed)
        if self.device.type == "cuda":  # for batches on their way to it, and for what is offloaded
            # Ray gives a process one thread; at most eight ranks share a node's cores.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // min(self.config.learner.ranks, 8)))

    def _load_student(self, shards: checkpoint.Shards | None) -> None:
        """The model with its loss, whole, with the weights of `shards` where there are any."""
        lm = load_causal_lm(self.config.model)
        check_packing(lm, self.config.model.path)
        if self.config.model.lora.rank:
            attach(lm, self.config.model.lora)
        tune(lm, self.config.learner)
        if shards is not None:
            with torch.no_grad():  # DeepSpeed takes its master weights from here
                for name, param in lm.named_parameters():
                    if param.requires_grad:
                        param.copy_(shards.full("master", name, tuple(param.shape)))
        transform = logit_transform(lm.config.get_text_config())
        check_head(lm, transform, self.config.model.path)
        self.student = Student(lm, self.vocab_size, objective(self.config, transform))
        named = self.student.named_weights()
        self._shapes = {name: tuple(p.shape) for name, p in named}
        self._named = {name: p for name, p in named if p.requires_grad}
        self._frozen = {name: p for name, p in named if not p.requires_grad}
        one_row = self.config.model.attention in ONE_ROW
        self._layout = one_after_another if one_row else partial(rows, width=lm.config.get_text_config().hidden_size)

    def _initialize_engine(self) -> None:
        """DeepSpeed's engine: shards the student and its optimizer."""
        import deepspeed

        settings = deepspeed_config(self.config)
        if self.config.learner.zero_stage == 3:  # shard by shard: `initialize` would put all of it on the GPU first
            deepspeed.zero.Init(module=self.student, config_dict_or_path=settings)
            for buffer in self.student.buffers():  # which it leaves, and `initialize` then, too
                buffer.data = buffer.data.to(self.device)
        deepspeed.comm.barrier()  # ranks load at different speeds, and DeepSpeed's own groups wait for ten minutes
        self.engine, *_ = deepspeed.initialize(
            model=self.student, model_parameters=list(self._named.values()), config=settings
        )
        add_gradients_directly(self.engine)
        # Before the driver loses patience: who is still silent when the others have given up is the one that hangs.
        set_timeouts(timedelta(seconds=0.8 * self.config.cluster.timeout_s))

    def update(
        self, step: int, num_steps: int, micro_batches: list[list[TrainItem]], total_tokens: int, total_sequences: int
    ) -> RankMetrics:
        """One optimizer step over this rank's micro-batches; the totals are over all ranks."""
        started = time.time()
        items = [item for micro_batch in micro_batches for item in micro_batch]
        fetched = iter(fetch([piece for item in items for piece in (item.sample, item.targets) if piece is not None]))
        payloads = {item.key: (next(fetched), next(fetched)) for item in items if item.sample is not None}
        waited = time.time()
        rate = learning_rate(self.config.optim, step, num_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        parts, slots = [], 0
        for i, micro_batch in enumerate(micro_batches):
            micro_batch = sorted(micro_batch, key=lambda item: item.teacher_version)
            sequences = [self._sequence(item, payloads.get(item.key)) for item in micro_batch]
            weights = [
                token_weight(
                    len(s.completion_ids), self.config, total_tokens=total_tokens, total_sequences=total_sequences
                )
                for s in sequences
            ]
            heads, skip = self._teacher_heads if self._applies_heads else None, self.config.skipped_tokens
            batch = build(sequences, weights, skip, teacher_heads=heads, layout=self._layout, device=self.device)
            self.engine.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
            losses = self.engine(batch)
            # DeepSpeed averages gradients over ranks; the weights are global, so the sum is wanted.
            self.engine.backward(losses.total * self.world_size)
            slots += batch.input_ids.numel()
            parts.append(done(losses, batch, [len(s.completion_ids) for s in sequences], skip))
        grad_norm, self._moved = step_and_norm(self.engine), True
        if self.ema is not None and math.isfinite(grad_norm):
            self.ema.update(self._fragments(), self.config.teacher.ema_rate)
        if self.config.cluster.sleep:
            torch.cuda.empty_cache()  # for the engines that wake now
        tally = Tally()
        for part in parts:
            tally.add(part)
        spans = (Span("fetch", started, waited), Span("train", waited, time.time()))
        return RankMetrics(tally=tally, grad_norm=grad_norm, learning_rate=rate, slots=slots, spans=spans)

    def logprobs(self, pairs: list[tuple[np.ndarray, np.ndarray]], temperature: float) -> list[np.ndarray]:
        """Log-probs, float32 [C], of each (prompt, completion), in one forward pass without gradients."""
        sequences = [TrainSequence(prompt_ids=p, completion_ids=c) for p, c in pairs]
        batch = build(sequences, [0.0] * len(pairs), 0, teacher_heads=None, layout=self._layout, device=self.device)
        head_loss = self.student.head_loss
        trained = head_loss.objective
        head_loss.objective = replace(
            trained, kind="cross_entropy", importance="none", temperature=temperature, liger_beta=None, compiled=False
        )
        try:
            with torch.no_grad():
                found = self.engine(batch).label_logprobs.cpu().numpy()
        finally:
            head_loss.objective = trained
        return np.split(found, np.cumsum([len(c) for _, c in pairs])[:-1])

    def open_push(self, role: str, num_receivers: int, kind: TransportKind) -> tuple[str, int] | None:
        """Rank 0 opens the rendezvous of a push group and returns its address."""
        if self.rank:
            return None
        import ray

        host = ray.util.get_node_ip_address()
        if role in self._senders:
            self._senders[role].close()
        self._senders[role] = Sender(host, num_receivers, self.config.cluster.timeout_s, kind, self.device)
        return host, self._senders[role].port

    def connect_push(self, role: str) -> None:
        """Rank 0 waits for the role's receivers."""
        if not self.rank:
            self._senders[role].connect()

    def head_name(self) -> str:
        """Name of the output head among the pushed weights."""
        return self.student.head_name()

    def manifest(self, version: int, whole: bool) -> WeightManifest:
        """What `push(role, version)` will send: all weights, or those that are trained."""
        wire = getattr(torch, self.config.model.dtype)
        shapes = {name: shape for name, shape in self._shapes.items() if whole or name in self._named}
        plan = manifest(version, shapes, wire, self.config.cluster.push_bucket_mib << 20)
        return replace(plan, adapter_scale=self.config.model.lora.scale)

    def push(self, role: str, version: int, whole: bool, oldest_in_flight: int) -> Span:
        """Send the weights of `role` ("generators": the student; "teachers": what teaches) as `version`, or
        without `whole` those that are trained.

        Returns when they are copied; they leave while this rank goes on. The head of a teacher that sends states is
        kept until no targets older than `oldest_in_flight` can come.
        """
        started = time.time()
        keep = self.student.head_name() if role == "teachers" and self._applies_heads else None
        head = push(self.manifest(version, whole), self._source(role), self._senders.get(role), keep)
        if keep is not None:
            if head is None:  # a frozen one, which came with the first push
                head = next(iter(self._teacher_heads.values()))
            self._teacher_heads[version] = head.to(self.device)  # a frozen teacher's weights are in host memory
            for old in [v for v in self._teacher_heads if v < oldest_in_flight]:
                del self._teacher_heads[old]
        return Span("gather weights", started, time.time())

    def sees(self, path: str) -> bool:
        """Whether a file of the driver's is there for this rank too."""
        return Path(path).is_file()

    def start_saving(self, folder: str) -> None:
        """Copy this rank's state and begin to write it into `folder`; with learner.offload=optimizer write it."""
        step, anchor = optimizer_step(self.engine), self.config.teacher.anchor
        self._writer.start(Path(folder), self.rank, self._fragments(), self.ema, step, anchor)

    def finish_saving(self, wait: bool) -> list[ShardFile] | None:
        """What was written; None while that is under way and `wait` is false."""
        return self._writer.finish(wait)

    def state_bytes(self) -> int:
        """Size of this rank's part of a checkpoint."""
        kinds = 3 + (self.ema is not None)  # weights and two moments
        return 4 * kinds * sum(f.master.numel() for f in self._fragments())

    def roofline(self) -> Roofline:
        """What this rank's device reaches."""
        return measure(self.device, getattr(torch, self.config.model.dtype))

    def peak_gib(self) -> float:
        """Peak memory of this rank."""
        return own_peak_gib(self.device.type)

    def stop(self) -> None:
        """Shut the engine and the process group down; ZeRO-3 aborts at exit otherwise."""
        import deepspeed

        for sender in self._senders.values():
            sender.close()
        self._writer.close()
        self.engine.destroy()
        deepspeed.comm.destroy_process_group()  # with DeepSpeed's own records of its groups

    @property
    def _applies_heads(self) -> bool:
        """Whether teachers send states, to which this rank applies their heads."""
        return self.student.head_loss.objective.kind == "full"

    def _fragments(self) -> Any:
        return fragments(self.engine, list(self._named.items()))

    def _source(self, role: str) -> WeightSource:
        source = self._trained(role)
        return together(student_source(self._frozen), source) if self._frozen else source

    def _trained(self, role: str) -> WeightSource:
        if role == "teachers" and self.ema is not None:
            return ema_source(self.ema, self._shapes, self.device)
        teacher, path = self.config.teacher, self.config.model.path
        if role == "teachers" and teacher.kind == "base" and (teacher.anchor or self._moved):
            if self._frozen:  # the base is what the adapters are added to
                return lambda names: {name: torch.zeros(self._shapes[name]) for name in names}
            frozen = self._weights_of(teacher.anchor or path)
            return lambda names: {name: frozen[name] for name in names}
        return student_source(self._named)

    def _weights_of(self, path: str) -> dict[str, torch.Tensor]:
        """Weights of the model folder where the teacher starts."""
        update = {} if path == self.config.model.path else {"path": path, "revision": None}
        lm = load_causal_lm(self.config.model.model_copy(update=update))
        weights = {name: p.detach() for name, p in lm.named_parameters()}
        if {name: tuple(p.shape) for name, p in weights.items()} != self._shapes:
            raise UserError(f"teacher.anchor: {path} has other weights than model.path")
        return weights

    def _restore(self, shards: checkpoint.Shards, *, anchored: bool) -> None:
        """Master weights, moments, random state and, unless it is `anchored`, the average, exactly as they were
        saved."""
        if shards.optimizer_step:
            make_optimizer_state(self.engine, shards.optimizer_step)
        for f in fragments(self.engine, list(self._named.items()), copies=True):
            for kind, value in {"master": f.master, **f.state}.items():
                value.detach().copy_(shards.read(kind, f.name, f.start, value.numel()))
        if self.ema is not None and not anchored:
            # A run that had no average starts one at its weights.
            kind = "ema" if shards.has("ema") else "master"
            self.ema.load(lambda name, start, size: shards.read(kind, name, start, size))
        random_state = shards.rng_state(self.rank)
        if random_state is not None:
            torch.set_rng_state(random_state)

    def _sequence(self, item: TrainItem, payload: tuple[Sample, TeacherTargets] | None) -> TrainSequence:
        problem = self.problems[item.key.problem]
        if payload is None:
            return TrainSequence(prompt_ids=problem.prompt_ids, completion_ids=problem.demonstration_ids)
        sample, targets = payload
        assert sample.key == targets.key == item.key
        return TrainSequence(
            prompt_ids=problem.prompt_ids,
            completion_ids=sample.completion_ids,
            logprobs=sample.logprobs,
            teacher=targets,
        )


def objective(config: Config, transform: LogitTransform) -> Objective:
    """What `loss` and `method` ask for at each position."""
    loss, compiled = config.loss, config.learner.compile and transform.softcap is None
    if config.method != "sdft":
        return Objective(
            kind="dft" if config.method == "dft" else "cross_entropy", transform=transform, compiled=compiled
        )
    kind: Kind = "full" if loss.support == "full" else "chosen"
    if loss.support == "sampled" and not loss.tail:
        kind = "policy_gradient"
    return Objective(
        kind=kind,
        divergence=divergence(loss.divergence, loss.beta),
        tail=loss.tail,
        temperature=config.rollout.temperature,
        importance=loss.importance,
        importance_clip=loss.importance_clip,
        token_clip=loss.token_clip,
        transform=transform,
        liger_beta=_liger_beta(loss, transform),
        compiled=compiled,
    )


def _liger_beta(loss: LossConfig, transform: LogitTransform) -> float | None:
    """The divergence as the beta of Liger's JSD, where its kernel is asked for."""
    if loss.kernel != "liger":
        return None
    if transform != LogitTransform():
        raise UserError("loss.kernel=liger: this model scales or caps its logits, which Liger's kernel does not")
    return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": loss.beta}[loss.divergence]


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])
