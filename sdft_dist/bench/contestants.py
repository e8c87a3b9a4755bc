"""What `sdft bench` compares: our methods, each on a fleet of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from rich.console import Console

from sdft_dist.bench.account import Machine
from sdft_dist.cluster import launch
from sdft_dist.config import Config
from sdft_dist.fleet import Fleet
from sdft_dist.inputs import Inputs, read_inputs
from sdft_dist.loop import train
from sdft_dist.prepare import check_device
from sdft_dist.problems import ProblemSet
from sdft_dist.recipe import parse
from sdft_dist.runlog import RunLog
from sdft_dist.session import resolve_device
from sdft_dist.topology import needs, num_gpus, sizes


class Contestant(Protocol):
    """Does optimizer steps; `after_step` blocks while others have their turn."""

    @property
    def name(self) -> str: ...

    def __call__(self, num_steps: int, after_step: Callable[[int], None]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Ours:
    """One of our methods on a fleet of its own; metrics and trace go to `folder`."""

    name: str
    config: Config
    inputs: Inputs
    folder: Path
    machines: list[Machine] = field(default_factory=list)  # one, when it has come to its end

    def __call__(self, num_steps: int, after_step: Callable[[int], None]) -> None:
        config = self.config.changed(steps=num_steps)
        self.folder.mkdir(parents=True, exist_ok=True)
        console = Console(quiet=True)
        with (
            RunLog(self.folder, title=self.name, console=console, trace=self.folder / "trace.json") as log,
            launch(config, self.inputs, on_span=log.span) as fleet,
        ):
            train(config, self.inputs.problems, fleet.rollouts, fleet, fleet, log, after_step=after_step)
            self.machines.append(machine(fleet))


def machine(fleet: Fleet) -> Machine:
    """What the fleet has needed, and what its devices reach."""
    peak_gib = fleet.peak_gib()  # first: measuring takes memory too
    return Machine(**fleet.learner.roofline()._asdict(), peak_gib=peak_gib)


def contestant(config: Config, method: str, out: Path, *, fixed: bool) -> Ours:
    """One of our methods on the recipe's rows; one without a teacher keeps no average. With `fixed` all completions
    have `rollout.max_completion_tokens`, and the demonstrations that are imitated too."""
    check_device(config)
    inputs = read_inputs(config)
    if fixed:
        problems = _imitating(inputs.problems, config.rollout.max_completion_tokens)
        inputs = replace(inputs, problems=problems, stop_ids=[])
    fields = {**config.model_dump(), "method": method, "run_dir": str(out / method)}
    if method != "sdft":
        fields["teacher"]["kind"] = "base"
    return Ours(name=method, config=parse(Config, fields), inputs=inputs, folder=out / method)


def devices(config: Config) -> int:
    """GPUs that the method's roles take to train, without generators that only evaluate. On CPU all share one."""
    roles = ("learner", "generator", "teacher") if config.method == "sdft" else ("learner",)
    if resolve_device(config) == "cpu":
        return 1
    return num_gpus(needs(config, "cuda", roles))


def spans(config: Config) -> dict[str, int]:
    """Devices of one actor of each role."""
    on_cpu = resolve_device(config) == "cpu"
    return {role: 1 if on_cpu else size.gpus for role, size in sizes(config).items()}


def _imitating(problems: ProblemSet, num_tokens: int) -> ProblemSet:
    """The same prompts with demonstrations of as many tokens as SDFT's completions have."""
    import numpy as np

    return ProblemSet(replace(p, demonstration_ids=np.resize(p.demonstration_ids, num_tokens)) for p in problems)
