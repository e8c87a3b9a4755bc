"""Ray: starts or joins a cluster and places the actors; the only file that builds both sides.

Every actor is owned by the driver: when the driver ends, however it ends, Ray ends them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from actors.pool import Pool
from actors.stream import Stream
from learner.group import LearnerGroup
from sdft_dist.config import Config
from sdft_dist.errors import (
    ActorLost,
    Diverged,
    Fault,
    NotServing,
    Preempted,
    ScorerFailed,
    UserError,
    brief,
    is_broken_device,
    is_out_of_memory,
)
from sdft_dist.fleet import Fleet
from sdft_dist.inputs import Inputs
from sdft_dist.last_words import is_death, obituary
from sdft_dist.placement import Places, placed
from sdft_dist.remote import Events
from sdft_dist.rundir import Start
from sdft_dist.topology import PLURAL, roles_of
from sdft_dist.types import OnSpan

FROM_THE_BEGINNING = Start()
REACH_S = 20.0  # for a head to answer
SLICE_S = 0.05  # of decoding, after which finished samples go on and new weights may come in


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
        if resolve_device(config) == "cpu":  # on GPUs Ray's own choice: states of a large model take gigabytes
            options["object_store_memory"] = 1 << 30
    else:
        _reach(config.cluster.address)
    # Without "local", Ray would join a cluster that somebody has started on this machine.
    ray.init(address=config.cluster.address or "local", **options)
    try:
        yield
    finally:
        ray.shutdown()


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


@contextmanager
def launch(
    config: Config,
    inputs: Inputs,
    *,
    engines: Collection[str] = ("generator", "teacher"),
    on_span: OnSpan = lambda role, index, span: None,
    on_event: Callable[[str], None] = lambda text: None,
    start: Start = FROM_THE_BEGINNING,
    stop: Callable[[], bool] = lambda: False,
    wait_for_nodes: bool = False,
) -> Iterator[Fleet]:
    """All actors of a run, ready and connected, with the learner at `start`; they end with the block. Of the
    engines that the run needs, those that `engines` names are started.

    `on_span` hears what they do, `on_event` what befalls them; `stop` says whether to stop; `wait_for_nodes` is
    as for `placed`. Raises ActorLost where an actor's end or silence is behind an error.
    """
    config = _with_absolute_paths(config)
    device, actors = resolve_device(config), dict[tuple[str, int], Any]()  # by role and index
    roles = roles_of(config) & {"learner", *engines}
    with placed(config, device, roles, wait_for_nodes, stop, on_event) as places, _ending(actors):
        fleet = _build(config, inputs, places, on_span, on_event, start, stop, actors)
        yield fleet
        fleet.learner.stop()


@contextmanager
def serving(config: Config, stop_ids: list[int], vocab_size: int | None) -> Iterator[Any]:
    """A Pool of `cluster.generators` generators with the weights of `model.path`, without a learner; of `vocab_size`
    as for `Generator`. Raises Fault where one of them ends or hangs."""
    import ray

    from actors.rollout import Generator

    config = _with_absolute_paths(config)
    device, size = resolve_device(config), config.cluster.generators
    actors: dict[tuple[str, int], Any] = {}
    try:
        with placed(config, device, ("generator",)) as places, _ending(actors):
            for i in range(size):
                options = places.options("generator", i, size)
                actor = ray.remote(Generator).options(**options).remote(config, device, stop_ids, None, vocab_size)
                actors["generator", i] = actor
            timeout_s, start_timeout_s = config.cluster.timeout_s, config.cluster.start_timeout_s
            made = list(actors.values())
            pool = Pool("generators", made, timeout_s, Events(), start_timeout_s=start_timeout_s)
            pool.wait_ready()
            yield pool
    except ActorLost as error:
        raise Fault(f"lost a generator: {error}") from error


@contextmanager
def _ending(actors: Mapping[tuple[str, int], Any]) -> Iterator[None]:
    """Ends the actors with the block, and tells its errors in this project's terms."""
    import ray

    try:
        yield
    except (UserError, Fault, Preempted, Diverged, ScorerFailed):
        raise
    except Exception as error:
        explained = explain(error, list(actors.values()))
        if explained is None:
            raise
        raise explained from error
    finally:
        for actor in actors.values():
            ray.kill(actor)


def _with_absolute_paths(config: Config) -> Config:
    """The same for actors, which may work in another folder than this process."""

    def absolute(path: str | None) -> str | None:
        return str(Path(path).absolute()) if path and Path(path).is_dir() else path

    model = config.model.model_copy(update={"path": absolute(config.model.path)})
    teacher = config.teacher.model_copy(update={"anchor": absolute(config.teacher.anchor)})
    return config.model_copy(update={"model": model, "teacher": teacher})


def explain(error: Exception, actors: list[Any]) -> Exception | None:
    """The error in this project's terms; None where no failure of an actor, a machine or its memory caused it."""
    from ray.exceptions import ObjectLostError, ObjectStoreFullError, OutOfDiskError

    if isinstance(error, OutOfDiskError | ObjectStoreFullError):
        return Fault(f"Ray's object store is full and has no disk to spill to; checkpoints are intact: {brief(error)}")
    if is_out_of_memory(getattr(error, "cause", None)):
        return UserError(
            "a GPU's memory does not hold the learner's step: lower learner.tokens_per_microbatch, give "
            f"learner.gradient_checkpointing=full, or see what sdft plan says; checkpoints are intact: {brief(error)}"
        )
    # The third is what a process group says when a rank hangs; the error's note names the rank.
    lost = isinstance(error, TimeoutError | NotServing | ObjectLostError) or "timed out" in str(error).lower()
    if lost or is_death(error) or is_broken_device(getattr(error, "cause", None)) or _any_dead(actors):
        return ActorLost(obituary(error))
    return None


def _any_dead(actors: list[Any]) -> bool:
    """Whether an actor has ended; its end may become known some seconds after what it caused."""
    import ray

    refs = [actor.__ray_ready__.remote() for actor in actors]
    ready, _ = ray.wait(refs, num_returns=len(refs), timeout=5.0)
    for ref in ready:
        try:
            ray.get(ref)
        except Exception as error:
            if is_death(error):
                return True
            raise
    return False


def _build(
    config: Config,
    inputs: Inputs,
    places: Places,
    on_span: OnSpan,
    on_event: Callable[[str], None],
    start: Start,
    stop: Callable[[], bool],
    actors: dict[tuple[str, int], Any],
) -> Fleet:
    import ray

    from actors.rollout import Generator
    from actors.teacher import Teacher
    from learner.worker import LearnerRank

    device, vocab_size = places.device, inputs.vocab_size
    table, events = ray.put(inputs.problems), Events(stop, config.checkpoint.grace_s)
    cluster, ranks = config.cluster, config.learner.ranks
    together = 2 if config.method == "sdft" and config.rollout.max_staleness else 1

    def start_actor(cls: type, role: str, sharing: int, args: tuple[Any, ...], index: int) -> Any:
        actor = ray.remote(cls).options(**places.options(role, index, sharing)).remote(*args)
        actors[role, index] = actor  # a new one in the place of a lost one
        return actor

    def pool(role: str, cls: type, size: int, workers: int, *args: Any) -> Pool:
        make = partial(start_actor, cls, role, together * workers, args)
        made = [make(i) for i in range(size if places.has(role) else 0)]
        found = Pool(
            PLURAL[role], made, cluster.timeout_s, events, make, workers, places.transport, cluster.start_timeout_s
        )
        if cluster.colocate != "none":  # an engine looks how much memory is free, so they start one by one
            found.wait_ready()
        return found

    generators = pool(
        "generator",
        Generator,
        cluster.generators,
        cluster.generator_tensor_parallel,
        config, device, inputs.stop_ids, table, vocab_size,
    )  # fmt: skip
    teachers = pool(
        "teacher", Teacher, cluster.teachers, cluster.teacher_tensor_parallel, config, device, vocab_size, table
    )
    learner = LearnerGroup(
        config,
        [
            start_actor(LearnerRank, "learner", together * ranks, (config, r, ranks, device, vocab_size, table), r)
            for r in range(ranks)
        ],
        events,
        on_span,
    )
    learner.start(start.checkpoint)
    generators.wait_ready()
    teachers.wait_ready()
    for receivers in (generators, teachers):
        if receivers.actors:
            learner.open_push(receivers)
    fleet = Fleet(
        generators=generators,
        teachers=teachers,
        learner=learner,
        rollouts=stream(config, generators, teachers, events, on_span),
        config=config,
        start=start.step,
        on_event=on_event,
    )
    fleet.rollouts.mend = fleet.mend
    return fleet


def stream(config: Config, generators: Any, teachers: Any, events: Events, on_span: OnSpan) -> Stream:
    """The path of samples between the `actors` of two pools, as `config.rollout` asks for it."""
    return Stream(
        generators,
        teachers,
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
