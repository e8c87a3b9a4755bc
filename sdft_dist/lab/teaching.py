"""The files that teach new words, in the layout of any user's data."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from sdft_dist.files import refuse_used, write_jsonl
from sdft_dist.lab import world
from sdft_dist.recipe import dump_config, load_config

SETS = ("new", *world.OLD_SKILLS)  # held out
NUM_TRAIN = 3200
RECIPE = Path(__file__).parent / "recipe.yaml"
SWEEP = Path(__file__).parent / "sweep.yaml"
PLANS = {"final": Path(__file__).parent / "sequence.yaml", "sweep": Path(__file__).parent / "sequence-sweep.yaml"}


def write_sequence(folder: Path, base: Path, plan: str = "final") -> Path:
    """Write a plan for `sdft continual` that teaches the model `base` one word after another, each in a domain of
    its own, and all files that it names, into `folder`; returns the plan's path. `plan` is a key of PLANS."""
    for word, domain in zip(world.TAUGHT, world.DOMAINS, strict=True):
        write_teaching_set(folder / word, word, domain, seed=0, num_eval=150)
    recipe = load_config(RECIPE, [fields_of(folder / next(iter(world.TAUGHT)), base)])
    (folder / "recipe.yaml").write_text(dump_config(recipe))
    (folder / "plan.yaml").write_text(_plan(folder, plan))  # last, as it says that all of it is there
    return folder / "plan.yaml"


def written_sequence(folder: Path, plan: str = "final") -> Path | None:
    """The path of the plan that `write_sequence` has written into `folder`, None where the folder is unused. Raises
    UserError where it holds anything else, such as a plan that was changed."""
    path = folder / "plan.yaml"
    if path.is_file() and path.read_text() == _plan(folder, plan):
        return path
    refuse_used(folder)
    return None


def _plan(folder: Path, plan: str) -> str:
    return PLANS[plan].read_text().replace("FOLDER", str(folder))


def write_sweep(folder: Path, base: Path) -> Path:
    """Write SWEEP for the model `base`, and all files that it names, into `folder`; returns the sweep's path."""
    data, often = folder / "data", {"steps": 100, "eval.every": 25, "checkpoint.every": 25}
    write_teaching_set(data, *next(iter(zip(world.TAUGHT, world.DOMAINS, strict=True))), seed=0)
    recipe = load_config(RECIPE, [fields_of(data, base), often])
    (folder / "recipe.yaml").write_text(dump_config(recipe))
    (folder / "sweep.yaml").write_text(SWEEP.read_text().replace("FOLDER", str(folder)))
    return folder / "sweep.yaml"


def fields_of(data: Path, base: Path) -> dict[str, Any]:
    """Fields of a recipe that teaches the model `base` by the files that `write_teaching_set` has written into
    `data`."""
    sets = {name: str(data / f"eval-{name}.jsonl") for name in SETS}
    return {"model.path": str(base), "data.train": str(data / "train.jsonl"), "eval.sets": sets}


def write_teaching_set(folder: Path, word: str, domain: str, seed: int, *, num_eval: int = 198) -> None:
    """Write the data files that teach `word` in one domain: `train.jsonl`, `eval-new.jsonl` and one
    `eval-SKILL.jsonl` per old skill over all domains, with `prompt`, `demonstration`, `answer`.

    No training question is among the held-out ones of the new word.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held_out = world.rows(word, domain, num_eval, seed=-1)
    seen = {row.prompt for row in held_out}
    candidates = world.rows(word, domain, 2 * NUM_TRAIN + num_eval, seed)
    train = [row for row in candidates if row.prompt not in seen][:NUM_TRAIN]
    random.Random(seed).shuffle(train)
    sets = {"train": train, "eval-new": held_out}
    for skill in world.OLD_SKILLS:
        per_domain = [world.rows(skill, d, num_eval // len(world.DOMAINS), seed=-1) for d in world.DOMAINS]
        sets[f"eval-{skill}"] = [row for rows in per_domain for row in rows]
    for name, rows in sets.items():
        write_jsonl(folder / f"{name}.jsonl", (row._asdict() for row in rows))
