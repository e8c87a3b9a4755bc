"""Starts the actors of a run and connects them; the only file that builds both sides.

Every actor is owned by the driver: when the driver ends, however it ends, Ray ends them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from actors.pool import Pool
from actors.stream import Stream
from learner.group import LearnerGroup
from sdft_dist.config import Config
from sdft_dist.diagnosis import explain
from sdft_dist.errors import ActorLost, Diverged, Fault, Preempted, ScorerFailed, UserError
from sdft_dist.fleet import Fleet
from sdft_dist.inputs import Inputs
from sdft_dist.placement import Places, placed
from sdft_dist.remote import Events
from sdft_dist.rundir import Start
from sdft_dist.session import resolve_device
from sdft_dist.topology import PLURAL, roles_of, sizes
from sdft_dist.types import OnSpan

FROM_THE_BEGINNING = Start()
SLICE_S = 0.05  # of decoding, after which finished samples go on and new weights may come in


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
    import ray

    from actors.rollout import Generator
    from actors.teacher import Teacher

    config = _with_absolute_paths(config)
    roles = roles_of(config) & {"learner", *engines}
    device, events = resolve_device(config), Events(stop, config.checkpoint.grace_s)
    with placed(config, device, roles, wait_for_nodes, stop, on_event) as places, _crew(config, places, events) as crew:
        table, vocab_size = ray.put(inputs.problems), inputs.vocab_size
        generators = crew.engines(Generator, "generator", (config, device, inputs.stop_ids, table, vocab_size))
        teachers = crew.engines(Teacher, "teacher", (config, device, vocab_size, table))
        learner = crew.learner((device, vocab_size, table), on_span)
        learner.start(start.checkpoint)
        pools = [pool for pool in (generators, teachers) if pool.actors]
        for pool in pools:
            pool.wait_ready()
        for pool in pools:
            learner.open_push(pool)
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
        yield fleet
        learner.stop()


@contextmanager
def serving(config: Config, stop_ids: list[int], vocab_size: int | None) -> Iterator[Any]:
    """A Pool of `cluster.generators` generators with the weights of `model.path`, without a learner. They sample of the
    first `vocab_size` ids where that is given. Raises Fault where one of them ends or hangs."""
    from actors.rollout import Generator

    config = _with_absolute_paths(config)
    device = resolve_device(config)
    try:
        with placed(config, device, ("generator",)) as places, _crew(config, places, Events()) as crew:
            args = (config, device, stop_ids, None, vocab_size)
            pool = crew.engines(Generator, "generator", args, alone=True)
            pool.wait_ready()
            yield pool
    except ActorLost as error:
        raise Fault(f"lost a generator: {error}") from error


class _Crew:
    """Starts actors in their places; `actors` has the present one of each role and index."""

    def __init__(self, config: Config, places: Places, events: Events) -> None:
        self._config, self._places, self._events = config, places, events
        self.actors: dict[tuple[str, int], Any] = {}
        self._at_once = 2 if config.method == "sdft" and config.rollout.max_staleness else 1  # roles at work

    def engines(self, cls: type, role: str, args: tuple[Any, ...], *, alone: bool = False) -> Pool:
        """All engines of a role; none where there is no place for it. `alone`: no other role works besides."""
        cluster, (size, workers) = self._config.cluster, sizes(self._config)[role]
        make = partial(self._start, cls, role, size if alone else self._at_once * workers, args)
        found = Pool(
            PLURAL[role],
            [make(i) for i in range(size if self._places.has(role) else 0)],
            cluster.timeout_s,
            self._events,
            make,
            workers,
            self._places.transport,
            cluster.start_timeout_s,
        )
        if cluster.colocate != "none":  # an engine looks how much memory is free, so they start one by one
            found.wait_ready()
        return found

    def learner(self, args: tuple[Any, ...], on_span: OnSpan) -> LearnerGroup:
        """All learner ranks; `args` follow configuration, rank and number of ranks."""
        from learner.worker import LearnerRank

        ranks = self._config.learner.ranks
        made = [
            self._start(LearnerRank, "learner", self._at_once * ranks, (self._config, rank, ranks, *args), rank)
            for rank in range(ranks)
        ]
        return LearnerGroup(self._config, made, self._events, on_span)

    def _start(self, cls: type, role: str, sharing: int, args: tuple[Any, ...], index: int) -> Any:
        import ray

        actor = ray.remote(cls).options(**self._places.options(role, index, sharing)).remote(*args)
        self.actors[role, index] = actor  # a new one in the place of a lost one
        return actor


@contextmanager
def _crew(config: Config, places: Places, events: Events) -> Iterator[_Crew]:
    """Its actors end with the block, and errors of the block are told in this project's terms."""
    import ray

    crew = _Crew(config, places, events)
    try:
        yield crew
    except (UserError, Fault, Preempted, Diverged, ScorerFailed):
        raise
    except Exception as error:
        explained = explain(error, list(crew.actors.values()))
        if explained is None:
            raise
        raise explained from error
    finally:
        for actor in crew.actors.values():
            ray.kill(actor)


def _with_absolute_paths(config: Config) -> Config:
    """The same for actors, which may work in another folder than this process."""

    def absolute(path: str | None) -> str | None:
        return str(Path(path).absolute()) if path and Path(path).is_dir() else path

    path, anchor = absolute(config.model.path), absolute(config.teacher.anchor)
    return config.changed(model={"path": path}, teacher={"anchor": anchor})


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
