"""The files that teach new words, in the layout of any user's data."""

from __future__ import annotations

import random
from pathlib import Path

from sdft_dist.files import refuse_used, write_jsonl
from sdft_dist.lab import world
from sdft_dist.recipe import dump_config, load_config

SETS = ("new", *world.OLD_SKILLS)  # held out
RECIPE = Path(__file__).parent / "recipe.yaml"
SWEEP = Path(__file__).parent / "sweep.yaml"
PLANS = {"final": Path(__file__).parent / "sequence.yaml", "sweep": Path(__file__).parent / "sequence-sweep.yaml"}


def write_sequence(folder: Path, base: Path, plan: str = "final") -> Path:
    """Write a plan for `sdft continual` that teaches the model `base` one word after another, each in a domain of
    its own, and all files that it names, into `folder`; returns the plan's path. `plan` is a key of PLANS."""
    for word, domain in zip(world.TAUGHT, world.DOMAINS, strict=True):
        write_teaching_set(folder / word, word, domain, seed=0, num_eval=150)
    first = folder / next(iter(world.TAUGHT))
    files = {"model.path": base, "data.train": first / "train.jsonl", "eval.sets.new": first / "eval-new.jsonl"}
    recipe = load_config(RECIPE, [{name: str(path) for name, path in files.items()}])
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
    write_teaching_set(folder / "data", *next(iter(zip(world.TAUGHT, world.DOMAINS, strict=True))), seed=0)
    sets = {name: str(folder / "data" / f"eval-{name}.jsonl") for name in SETS}
    fields = {"model.path": str(base), "data.train": str(folder / "data" / "train.jsonl"), "eval.sets": sets}
    recipe = load_config(RECIPE, [fields, {"steps": 100, "eval.every": 25, "checkpoint.every": 25}])
    (folder / "recipe.yaml").write_text(dump_config(recipe))
    (folder / "sweep.yaml").write_text(SWEEP.read_text().replace("FOLDER", str(folder)))
    return folder / "sweep.yaml"


def write_teaching_set(
    folder: Path, word: str, domain: str, seed: int, *, num_train: int = 3200, num_eval: int = 198
) -> None:
    """Write the data files that teach `word` in one domain: `train.jsonl`, `eval-new.jsonl` and one
    `eval-SKILL.jsonl` per old skill over all domains, with `prompt`, `demonstration`, `answer`.

    No training question is among the held-out ones of the new word.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held_out = world.rows(word, domain, num_eval, seed=-1)
    seen = {row.prompt for row in held_out}
    candidates = world.rows(word, domain, 2 * num_train + num_eval, seed)
    train = [row for row in candidates if row.prompt not in seen][:num_train]
    random.Random(seed).shuffle(train)
    sets = {"train": train, "eval-new": held_out}
    for skill in world.OLD_SKILLS:
        per_domain = [world.rows(skill, d, num_eval // len(world.DOMAINS), seed=-1) for d in world.DOMAINS]
        sets[f"eval-{skill}"] = [row for rows in per_domain for row in rows]
    for name, rows in sets.items():
        write_jsonl(folder / f"{name}.jsonl", (row._asdict() for row in rows))
