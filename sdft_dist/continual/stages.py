"""`sdft continual PLAN`: tasks taught one after another from one start, methods side by side.

Every stage is an ordinary run from the model of the stage before it. After each, all tasks and all prior
skills are evaluated. What is finished is kept and not repeated, so that the same command goes on where
it was interrupted.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator
from rich.console import Console

from sdft_dist.config import Config, DataConfig, Section
from sdft_dist.continual.results import PRIOR, write_results
from sdft_dist.data import Row, load_rows, load_training_rows
from sdft_dist.errors import ConfigError, Diverged
from sdft_dist.files import write_whole
from sdft_dist.recipe import Files, load_config, of_many_runs, parse
from sdft_dist.rundir import RunDir, refuse_other_settings
from sdft_dist.session import ray_session
from sdft_dist.train import run

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # also the name of a folder

# Fields that every stage gets from the plan, and where the plan has them.
OWN_FIELDS = {
    "run_dir": "the folder of all runs is `out`",
    "seed": "give `seeds`",
    "model.path": "the start is model.path of the recipe, and then the model of the stage before",
    "data.train": "give `train` of each task",
    "eval.sets": "give `eval` of each task, and `prior`",
}


class TaskPlan(Section):
    """One task of a plan."""

    train: str = Field(description="Demonstrations, as data.train.")
    eval: str = Field(description="Held-out rows, as eval.sets.")
    set: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of the recipe for this task, dotted; not those that a plan itself sets: run_dir, seed, "
        "model.path, data.train, eval.sets.",
    )


class MethodPlan(Section):
    """One method of a plan."""

    rehearse: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of each stage's rows of earlier tasks, evenly; those of a task with too few repeat.",
    )
    set: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of the recipe, dotted: {method: sft}; not those that a plan itself sets.",
    )


class Plan(Section):
    """What `sdft continual` does."""

    recipe: Files = Field(
        description="Recipe that holds for all runs: a file, or several, one over the other; model.path in it is the "
        "start."
    )
    out: str = Field(description="Folder for all runs and results.")
    tasks: dict[str, TaskPlan] = Field(min_length=1, description="In the order in which they are taught.")
    prior: dict[str, str] = Field(default_factory=dict, description="Held-out files of what the start knows, by name.")
    methods: dict[str, MethodPlan] = Field(min_length=1, description="What is compared, by name.")
    seeds: list[int] = Field([0], min_length=1, description="Each method is run with each of them as `seed`.")

    @field_validator("tasks", "prior", "methods")
    @classmethod
    def names(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Refuse names that are no folder's."""
        for name in value:
            if not re.match(NAME, name):
                raise ValueError(f"{name!r}: a name is made of letters, digits, '.', '_' and '-'")
        return value

    @field_validator("seeds")
    @classmethod
    def once(cls, value: list[int]) -> list[int]:
        """Refuse a seed that is given twice: both would be the same runs in the same folders."""
        for seed, number in Counter(value).items():
            if number > 1:
                raise ValueError(f"{seed} is given {number} times, expected each seed once")
        return value

    @model_validator(mode="after")
    def distinct(self) -> Plan:
        """Refuse a set that is both a task's and prior, or is called as the mean of the prior ones."""
        for field, names in (("tasks", self.tasks), ("prior", self.prior)):
            if PRIOR in names:
                raise ValueError(
                    f"{field}.{PRIOR}: is what results call the mean of all prior sets: give it another name"
                )
        for name in self.tasks.keys() & self.prior.keys():
            raise ValueError(f"prior.{name}: is a task's name too")
        return self

    @model_validator(mode="after")
    def own_fields(self) -> Plan:
        """Refuse fields that would be replaced by the plan's own."""
        sets = {f"tasks.{name}": task.set for name, task in self.tasks.items()}
        sets |= {f"methods.{name}": method.set for name, method in self.methods.items()}
        for place, fields in sets.items():
            for field, (own, instead) in itertools.product(_dotted(fields), OWN_FIELDS.items()):
                if f"{field}.".startswith(f"{own}."):
                    raise ValueError(f"{place}.set: {field}: is what the plan itself sets: {instead}")
        return self


def _dotted(fields: dict[str, Any]) -> Iterator[str]:
    """The names of fields, those of sections that are given whole among them."""
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            yield from (f"{name}.{below}" for below in _dotted(value))
        else:
            yield name


@dataclass(frozen=True)
class Stage:
    """One task, taught with one method and seed."""

    method: str
    seed: int
    task: str
    rows: DataConfig  # of the task itself; those of the run may be a mixture with earlier tasks'
    config: Config

    @property
    def done(self) -> bool:
        """Whether it came to its end."""
        return RunDir(self.folder).finished

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.config.run_dir)


def load_plan(path: Path) -> Plan:
    """Read a plan. Raises ConfigError with one line per mistake."""
    return parse(Plan, of_many_runs(path, "plan"))


def stages(plan: Plan) -> list[Stage]:
    """All runs of the plan, in order. Raises ConfigError where a recipe is wrong."""
    return [stage for seed in plan.seeds for method in plan.methods for stage in _sequence(plan, method, seed)]


def _sequence(plan: Plan, method: str, seed: int) -> list[Stage]:
    """One method with one seed. The teacher of a stage starts from the stage's own start, or with
    teacher.reanchor=false from the start of them all."""
    recipe, own = load_config(plan.recipe), plan.methods[method]
    sets = {name: task.eval for name, task in plan.tasks.items()} | plan.prior
    start, found = recipe.model.path, []
    for number, (name, task) in enumerate(plan.tasks.items(), start=1):
        folder = Path(plan.out) / f"{method}-seed{seed}" / f"{number}-{name}"
        fields = own.set | task.set
        values = {
            "eval.every": recipe.eval.every or 10**9,  # before and after each stage
            **({"teacher.anchor": recipe.model.path} if fields.get("teacher.reanchor") is False else {}),
            **fields,
            "run_dir": str(folder),
            "seed": seed,
            "model.path": start,
            "data.train": task.train,
            "eval.sets": sets,
        }
        config = load_config(plan.recipe, [values])
        if not config.eval.every:
            raise ConfigError(
                f"eval.every: got 0 with methods.{method} and tasks.{name}, expected 1 or more: the results need every "
                "stage's start and end; leave it out for these only"
            )
        rows = config.data
        if own.rehearse and number > 1:
            mixture = {"train": str(_mixture(plan, method, number, rows)), "split": "train", "limit": None}
            config = config.changed(data=mixture)
        found.append(Stage(method, seed, name, rows, config))
        start = str(folder / "model")
    return found


def _mixture(plan: Plan, method: str, number: int, rows: DataConfig) -> Path:
    """The file of stage `number`'s rows with a share of rows of earlier tasks. Its name holds what the run's own
    settings no longer tell, so that a change of it is noticed."""
    limit = f"-{rows.limit}" if rows.limit else ""
    name = f"{number}-{list(plan.tasks)[number - 1]}-{plan.methods[method].rehearse:g}{limit}.jsonl"
    return Path(plan.out) / "rehearsal" / method / name


def write_mixtures(plan: Plan) -> None:
    """Write the rows of all stages that rehearse: the task's own within data.limit, and rows of the earlier tasks,
    evenly, that make up the share; those of a task with too few repeat. Each call writes the same. Raises DataError."""
    for method, own in plan.methods.items():
        if not own.rehearse:
            continue
        taught: list[list[Row]] = []
        for stage in _sequence(plan, method, plan.seeds[0]):  # the same for all seeds
            rows = load_training_rows(stage.rows, stage.config.method)
            if taught:
                each = math.ceil(len(rows) * own.rehearse / (1 - own.rehearse) / len(taught))
                rng = random.Random(f"rehearsal/{len(taught) + 1}")
                again = [row for earlier in taught for row in _drawn(rng, earlier, each)]
                lines = [json.dumps(row.record(), ensure_ascii=False) + "\n" for row in [*rows, *again]]
                write_whole(Path(stage.config.data.train), "".join(lines))
            taught.append(rows)


def _drawn(rng: random.Random, rows: list[Row], number: int) -> list[Row]:
    """`number` of the rows, none of them again before all have come."""
    rounds, rest = divmod(number, len(rows))
    return [row for size in [*[len(rows)] * rounds, rest] for row in rng.sample(rows, size)]


def continual(plan: Plan, console: Console | None = None) -> dict[str, Any]:
    """Run what is missing of the plan; returns the results, which are also written into `out`. Raises, before anything
    starts, UserError where a stage was run before with other settings (but for where and how fast it works) and
    DataError where a file is wrong; and Diverged that names the sequences that diverged, when all others are done and
    their results are written."""
    work = stages(plan)
    for stage in work:
        refuse_other_settings(stage.config, ignore=("cluster", "checkpoint", "trace"))
    for rows, method in dict.fromkeys((stage.rows, stage.config.method) for stage in work):
        load_training_rows(rows, method)  # a mistake in the last file must not be found after days
    held_out = {f"tasks.{name}.eval": task.eval for name, task in plan.tasks.items()}
    for setting, source in (held_out | {f"prior.{name}": file for name, file in plan.prior.items()}).items():
        load_rows(source, need_demonstration=False, setting=setting)
    write_mixtures(plan)
    diverged = _teach(work, console)
    sequences: dict[str, dict[int, list[Path]]] = {}
    for stage in work:
        if (stage.method, stage.seed) not in diverged:
            sequences.setdefault(stage.method, {}).setdefault(stage.seed, []).append(stage.folder)
    found = write_results(Path(plan.out), list(plan.tasks), list(plan.prior), sequences) if sequences else {}
    if diverged:
        results = f"the results in {plan.out} are of the others" if found else "there are no results"
        total = len(plan.methods) * len(plan.seeds)
        head = f"{len(diverged)} of {total} sequences diverged; {results}:"
        raise Diverged("\n  ".join([head, *diverged.values()]))
    return found


def _teach(work: Sequence[Stage], console: Console | None) -> dict[tuple[str, int], str]:
    """Run what is missing. Returns, by method and seed, what ended the sequences that diverged."""
    diverged: dict[tuple[str, int], str] = {}
    with ray_session(work[0].config):
        for i, stage in enumerate(work, start=1):
            if not stage.done and (stage.method, stage.seed) not in diverged:
                title = f"{i}/{len(work)} {stage.method} seed {stage.seed} {stage.task}"
                try:
                    run(stage.config, title=title, console=console, resume="auto", advice="the same command goes on")
                except Diverged as error:
                    diverged[stage.method, stage.seed] = f"{stage.method}, seed {stage.seed}, {stage.task}: {error}"
    return diverged
