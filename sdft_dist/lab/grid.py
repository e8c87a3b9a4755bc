"""The lab under every divergence, teacher and support: `python -m sdft_dist.lab.grid`.

Trains once for each combination and seed and writes a Markdown table of the new word and the old
skills. Finished runs are kept and not repeated, so that it can be interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
from pathlib import Path

from rich.console import Console

from sdft_dist.cluster import ray_session
from sdft_dist.config import load_config
from sdft_dist.demo import DOMAIN, RECIPE, WORD
from sdft_dist.lab import world
from sdft_dist.lab.base import shipped_base
from sdft_dist.lab.teaching import write_teaching_set
from sdft_dist.runlog import read_metrics
from sdft_dist.train import run

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
TEACHERS = ("base", "ema", "live")
SUPPORTS = ("full", "topk", "sampled")


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/grid"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    grid = list(itertools.product(DIVERGENCES, TEACHERS, SUPPORTS))
    configs = {
        (case, seed): _overrides(args.out, case, seed, args.steps) for seed in range(args.seeds) for case in grid
    }
    recipes = {key: load_config(RECIPE, overrides) for key, overrides in configs.items()}
    with ray_session(next(iter(recipes.values()))):
        for (case, _), config in recipes.items():
            if not (Path(config.run_dir) / "model").exists():
                shutil.rmtree(config.run_dir, ignore_errors=True)  # what an interrupted run has left
                run(config, title=" ".join(case), console=Console())
    table = args.out / "table.md"
    table.write_text(_table(args.out, grid, args.seeds, args.steps))
    print(table.read_text())


def _run_dir(out: Path, case: tuple[str, str, str], seed: int) -> Path:
    return out / f"{'-'.join(case)}-seed{seed}"


def _overrides(out: Path, case: tuple[str, str, str], seed: int, steps: int) -> list[str]:
    data = out / f"data-{seed}"
    if not data.exists():
        write_teaching_set(data, WORD, DOMAIN, seed, num_eval=150)
    divergence, teacher, support = case
    values = {
        "run_dir": _run_dir(out, case, seed),
        "seed": seed,
        "steps": steps,
        "model.path": shipped_base(),
        "data.train": data / "train.jsonl",
        "eval.every": steps,
        "loss.divergence": divergence,
        "loss.support": support,
        "loss.top_k": 10,
        "teacher.kind": teacher,
        **{f"eval.sets.{name}": data / f"eval-{name}.jsonl" for name in ("new", *world.OLD_SKILLS)},
    }
    return [f"{key}={value}" for key, value in values.items()]


def _table(out: Path, grid: list[tuple[str, str, str]], seeds: int, steps: int) -> str:
    lines = [
        f"Accuracy after {steps} steps of 32 samples, %, mean of {seeds} seeds (lowest): new word / old skills.",
        "topk is 10 ids of the teacher with a tail; sampled is the sampled token with a tail.",
        "",
        "| divergence | teacher | " + " | ".join(SUPPORTS) + " |",
        "|---|---|" + "---|" * len(SUPPORTS),
    ]
    for divergence, teacher in itertools.product(DIVERGENCES, TEACHERS):
        cells = []
        for support in SUPPORTS:
            ends = [read_metrics(_run_dir(out, (divergence, teacher, support), s), "eval")[-1] for s in range(seeds)]
            new = [100 * e["new"] for e in ends]
            old = [100 * statistics.mean(e[skill] for skill in world.OLD_SKILLS) for e in ends]
            cells.append(" / ".join(f"{statistics.mean(x):.1f} ({min(x):.1f})" for x in (new, old)))
        lines.append(f"| {divergence} | {teacher} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
