"""Many short runs on the lab, as a table: `python -m sdft_dist.lab.grid objective` or `staleness`.

objective: every divergence, teacher and support. staleness: both divergences with rollouts further and
further ahead. Trains once for each combination and seed and writes a Markdown table of the new word and
the old skills. Finished runs are kept and not repeated, so that it can be interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sdft_dist.lab import world
from sdft_dist.lab.base import shipped_base
from sdft_dist.lab.demo import DOMAIN, WORD
from sdft_dist.lab.teaching import RECIPE, fields_of, write_teaching_set
from sdft_dist.recipe import load_config
from sdft_dist.rundir import RunDir
from sdft_dist.runlog import read_metrics
from sdft_dist.session import ray_session
from sdft_dist.train import run


@dataclass(frozen=True)
class Table:
    """Rows and columns are configuration fields with their values; `fixed` holds for all runs."""

    rows: dict[str, tuple[Any, ...]]
    columns: dict[str, tuple[Any, ...]]
    fixed: dict[str, Any]
    note: str


TABLES = {
    "objective": Table(
        rows={"loss.divergence": ("forward_kl", "reverse_kl", "jsd"), "teacher.kind": ("base", "ema", "live")},
        columns={"loss.support": ("full", "topk", "sampled")},
        fixed={"loss.top_k": 10},
        note="topk is 10 ids of the teacher with a tail; sampled is the sampled token with a tail.",
    ),
    "staleness": Table(
        rows={"loss.divergence": ("forward_kl", "reverse_kl")},
        columns={"rollout.max_staleness": (0, 1, 2, 4)},
        fixed={},
        note="The teacher is the average of the student.",
    ),
}


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--out", type=Path, default=None, help="default: runs/TABLE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    table, out = TABLES[args.table], args.out or Path("runs") / args.table
    cases = _products(table.rows | table.columns)
    recipes = [
        load_config(RECIPE, [_fields(out, case | table.fixed, _run_dir(out, case, seed), seed, args.steps)])
        for seed in range(args.seeds)
        for case in cases
    ]
    with ray_session(recipes[0]):
        for config in recipes:
            if not RunDir(Path(config.run_dir)).finished:
                run(config, title=Path(config.run_dir).name, console=Console(), resume="auto", advice="")
    text = _markdown(table, out, args.seeds, args.steps)
    (out / "table.md").write_text(text)
    print(text)


def _products(fields: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]


def _run_dir(out: Path, case: dict[str, Any], seed: int) -> Path:
    return out / ("-".join(map(str, case.values())) + f"-seed{seed}")


def _fields(out: Path, case: dict[str, Any], run_dir: Path, seed: int, steps: int) -> dict[str, Any]:
    data = out / f"data-{seed}"
    if not data.exists():
        write_teaching_set(data, WORD, DOMAIN, seed, num_eval=150)
    return {
        **case,
        "run_dir": str(run_dir),
        "seed": seed,
        "steps": steps,
        "eval.every": steps,
        **fields_of(data, shipped_base()),
    }


def _markdown(table: Table, out: Path, seeds: int, steps: int) -> str:
    fields, columns = [f.split(".")[1] for f in table.rows], _products(table.columns)
    heads = [" ".join(f"{f.split('.')[1]} {v}" for f, v in column.items()) for column in columns]
    lines = [
        f"Accuracy after {steps} steps of 32 samples, %, mean of {seeds} seeds (lowest): new word / old skills.",
        table.note,
        "",
        "| " + " | ".join([*fields, *heads]) + " |",
        "|" + "---|" * (len(fields) + len(heads)),
    ]
    for row in _products(table.rows):
        cells = [_cell([_run_dir(out, row | column, seed) for seed in range(seeds)]) for column in columns]
        lines.append("| " + " | ".join([*map(str, row.values()), *cells]) + " |")
    return "\n".join(lines) + "\n"


def _cell(runs: list[Path]) -> str:
    ends = [read_metrics(run, "eval")[-1] for run in runs]
    new = [100 * end["new"] for end in ends]
    old = [100 * statistics.mean(end[skill] for skill in world.OLD_SKILLS) for end in ends]
    return " / ".join(f"{statistics.mean(x):.1f} ({min(x):.1f})" for x in (new, old))


if __name__ == "__main__":
    main()
