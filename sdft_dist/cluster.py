"""Ray: starts or joins a cluster and places the actors; the only file that builds both sides.

Every actor is owned by the driver: when the driver ends, however it ends, Ray ends them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from actors.pool import Pool
from actors.stream import Stream
from learner.group import LearnerGroup
from sdft_dist.config import Config
from sdft_dist.data import ProblemSet
from sdft_dist.remote import Events
from sdft_dist.types import OnSpan

SLICE_S = 0.05  # of decoding, after which finished samples go on and new weights may come in


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """The three roles of a run. `teachers` has no actors for method=sft, and `generators` has none
    where there is nothing to sample or evaluate."""

    generators: Pool
    teachers: Pool
    learner: LearnerGroup
    rollouts: Stream
    teacher_moves: bool  # false for a frozen base, which is pushed once, at the start

    def to_generators(self, version: int) -> None:
        """Push the student. The first push is waited for, so that a broken one fails before any work is lost."""
        if self.generators.actors:
            self.learner.push(self.generators, version, version, wait=version == 0)

    def to_teachers(self, version: int) -> None:
        """Push what teaches; a frozen base is version 0 for good."""
        if self.teachers.actors and (self.teacher_moves or version == 0):
            oldest = self.rollouts.oldest_teacher_version()
            self.learner.push(self.teachers, version, oldest, wait=version == 0)
            self.rollouts.teacher_version = version


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
        options["object_store_memory"] = 1 << 30
    ray.init(address=config.cluster.address, **options)
    try:
        yield
    finally:
        ray.shutdown()


def resolve_device(config: Config) -> str:
    """ "cuda" or "cpu"."""
    if config.cluster.device != "auto":
        return config.cluster.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def launch(
    config: Config,
    problems: ProblemSet,
    vocab_size: int,
    stop_ids: list[int],
    *,
    with_teachers: bool = True,
    on_span: OnSpan = lambda role, index, span: None,
) -> Iterator[Fleet]:
    """All actors of a run, ready and connected; they end with the block. `on_span` hears what they do."""
    import ray

    device = resolve_device(config)
    actors: list[Any] = []
    try:
        num_teachers = config.cluster.teachers if config.method == "sdft" and with_teachers else 0
        fleet = _build(config, problems, vocab_size, stop_ids, device, num_teachers, on_span, actors)
        yield fleet
        fleet.learner.stop()
    finally:
        for actor in actors:
            ray.kill(actor)


def _build(
    config: Config,
    problems: ProblemSet,
    vocab_size: int,
    stop_ids: list[int],
    device: str,
    num_teachers: int,
    on_span: OnSpan,
    actors: list[Any],
) -> Fleet:
    import ray

    from actors.rollout import Generator
    from actors.teacher import Teacher
    from learner.worker import LearnerRank

    table, events = ray.put(problems), Events()
    sdft, cluster, ranks = config.method == "sdft", config.cluster, config.learner.ranks
    together = 2 if sdft and config.rollout.max_staleness else 1

    def place(cls: type, sharing: int, *args: Any) -> Any:
        actor = ray.remote(cls).options(**_resources(device, sharing)).remote(*args)
        actors.append(actor)
        return actor

    num_generators = cluster.generators if sdft or config.eval.every else 0
    generators = Pool(
        "generators",
        [place(Generator, together, config, device, stop_ids, table) for _ in range(num_generators)],
        cluster.timeout_s,
        events,
    )
    teachers = Pool(
        "teachers",
        [place(Teacher, together, config, device, vocab_size, table) for _ in range(num_teachers)],
        cluster.timeout_s,
        events,
    )
    learner = LearnerGroup(
        config,
        [place(LearnerRank, together * ranks, config, r, ranks, device, vocab_size, table) for r in range(ranks)],
        events,
        on_span,
    )
    learner.start()
    generators.wait_ready()
    teachers.wait_ready()
    for pool in (generators, teachers):
        if pool.actors:
            learner.open_push(pool)
    return Fleet(
        generators=generators,
        teachers=teachers,
        learner=learner,
        rollouts=stream(config, generators, teachers, events, on_span),
        teacher_moves=config.teacher.kind != "base",
    )


def stream(config: Config, generators: Any, teachers: Any, events: Events, on_span: OnSpan) -> Stream:
    """The path of samples between the `actors` of two pools, as `config.rollout` asks for it."""
    return Stream(
        generators.actors,
        teachers.actors,
        events,
        slice_s=SLICE_S if config.rollout.max_staleness else None,
        max_call_tokens=max(8192, config.model.max_length),
        target_bytes=_target_bytes(config),
        max_bytes=config.rollout.max_held_mib << 20,
        timeout_s=config.cluster.timeout_s,
        on_span=on_span,
    )


def _target_bytes(config: Config) -> int:
    """Bytes of one completion token's targets in the object store."""
    if config.loss.support != "full":
        return 4 + 8 * (config.loss.top_k if config.loss.support == "topk" else 1)
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(config.model.path, revision=config.model.revision)
    return settings.get_text_config().hidden_size * (2 if config.model.dtype == "bfloat16" else 4)


def _resources(device: str, sharing: int) -> dict[str, Any]:
    """Ray options of one actor. On CPU `sharing` actors that work at the same time divide the cores: the
    ranks of a learner, and the roles where rollouts run ahead; otherwise the roles take turns."""
    if device == "cuda":
        return {"num_gpus": 1, "num_cpus": 1}
    threads = max(1, (os.cpu_count() or 1) // sharing)
    env = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # idle threads must not spin on cores that another role needs
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {"num_cpus": 0, "runtime_env": {"env_vars": env}}
