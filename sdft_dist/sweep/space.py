"""What a sweep's file says: the settings that are varied for each method, and how they are searched."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sdft_dist.config import MEAN, Section
from sdft_dist.errors import ConfigError
from sdft_dist.recipe import Files, of_many_runs, parse


class Range(Section):
    """A range of numbers to draw from."""

    low: float = Field(description="Lowest value.")
    high: float = Field(description="Highest value.")
    log: bool = Field(False, description="Draw the logarithm evenly instead of the value.")

    @model_validator(mode="after")
    def order(self) -> Range:
        """Refuse an empty range."""
        if not (self.high > self.low and (self.low > 0 or not self.log)):
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}, and above 0 with log")
        return self

    def draw(self, rng: random.Random) -> float:
        """A value, to four digits."""
        ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = rng.uniform(*ends)
        return float(f"{math.exp(value) if self.log else value:.4g}")


class MethodSpace(Section):
    """What is tried of one method."""

    set: dict[str, Any] = Field(default_factory=dict, description="Fields of the recipe, dotted: {method: sft}.")
    space: dict[str, list[Any] | Range] = Field(
        default_factory=dict,
        description="Fields to vary, dotted, such as optim.learning_rate or model.path: values, or low and high.",
    )

    @field_validator("space", mode="before")
    @classmethod
    def kinds(cls, value: Any) -> Any:
        """Refuse what is neither, in one line."""
        for field, how in value.items() if isinstance(value, dict) else ():
            if not isinstance(how, list | dict | Range):
                raise ValueError(f"{field}: expected a list of values, or low and high")
        return value

    @field_validator("set", "space")
    @classmethod
    def plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Refuse dates, which YAML knows and no field of a recipe is."""
        for field, how in value.items():
            try:
                json.dumps(None if isinstance(how, Range) else how)
            except TypeError as e:
                raise ValueError(f"{field}: expected numbers, text, lists or mappings; put a date in quotes") from e
        return value


class Asha(Section):
    """Trials that are behind are stopped early (ASHA, arXiv 1810.05934)."""

    grace_steps: int = Field(ge=1, description="Optimizer steps before which no trial is stopped.")
    reduction: int = Field(3, ge=2, description="Of this many trials at a rung one goes on.")


class Sweep(Section):
    """What `sdft sweep` does."""

    recipe: Files = Field(description="Recipe that holds for all trials: a file, or several, one over the other.")
    out: str = Field(description="Folder for all trials and results.")
    methods: dict[str, MethodSpace] = Field(min_length=1, description="What is varied, by a name that tables show.")
    search: Literal["grid", "random", "optuna"] = Field(
        "grid", description="grid: all combinations. random and optuna: `trials` of each method."
    )
    trials: int | None = Field(None, ge=1, description="Trials of each method, for random and optuna.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of random and optuna; the trials' own seed is the recipe's.")
    new: str | None = Field(None, description="Held-out set of what is taught; default: the recipe's first.")
    metric: str = Field(MEAN, description="What optuna and asha go by: a held-out set, or mean of all.")
    asha: Asha | None = Field(None, description="Stop trials that are behind.")
    keep_checkpoints: bool = Field(
        True, description="Keep the checkpoints of trials that are done; false leaves their models and results only."
    )
    gpus: int | None = Field(None, ge=1, description="Most GPUs in use at a time; default: all of the cluster.")
    concurrent: int = Field(1, ge=1, description="Most trials at a time where they need no GPU.")

    @model_validator(mode="after")
    def check(self) -> Sweep:
        """Rules between fields."""
        if (self.trials is None) != (self.search == "grid"):
            raise ValueError("trials: is for search=random and search=optuna, which need it")
        if self.search == "optuna" and len(self.methods) > 1:
            raise ValueError("search: optuna searches one method's space; write one sweep for each")
        for name, method in self.methods.items():
            if "/" in name:
                raise ValueError(f"methods.{name}: expected a name without /, which folders are named after")
            ranges = [field for field, values in method.space.items() if isinstance(values, Range)]
            if self.search == "grid" and ranges:
                raise ValueError(f"methods.{name}.space.{ranges[0]}: search=grid needs a list of values")
            if [] in method.space.values():
                raise ValueError(f"methods.{name}.space: a list of values is empty")
        return self


def load_sweep(path: Path) -> Sweep:
    """Read a sweep. Raises ConfigError with one line per mistake, or where `out` can be no folder."""
    sweep = parse(Sweep, of_many_runs(path, "sweep"))
    for place in (Path(sweep.out), *Path(sweep.out).parents):
        if place.is_file():
            raise ConfigError(f"{path}: out: {place} is a file, expected a folder")
    return sweep


def points(sweep: Sweep, method: str) -> Iterator[dict[str, Any]]:
    """The values of a grid or a random search, which depend on the file alone."""
    space = sweep.methods[method].space
    if sweep.search == "grid":
        for values in itertools.product(*space.values()):
            yield dict(zip(space, values, strict=True))
        return
    assert sweep.trials is not None
    for number in range(sweep.trials):
        rng = random.Random(f"{sweep.seed}/{method}/{number}")
        yield {field: how.draw(rng) if isinstance(how, Range) else rng.choice(how) for field, how in space.items()}


def fits(space: dict[str, list[Any] | Range], values: dict[str, Any]) -> bool:
    """Whether a trial's values are of `space`, which may have been changed since."""
    return values.keys() == space.keys() and all(
        isinstance(value, int | float) and how.low <= value <= how.high if isinstance(how, Range) else value in how
        for value, how in ((values[field], how) for field, how in space.items())
    )
