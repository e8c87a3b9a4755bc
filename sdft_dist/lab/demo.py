"""`sdft demo`: one new word taught with SDFT and with SFT, from the same start and the same rows.

Shows what each learned and what each kept. Everything here goes through the same files and the same
`run` as any user's training.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sdft_dist.config import Config
from sdft_dist.errors import UserError
from sdft_dist.files import refuse_used
from sdft_dist.lab import world
from sdft_dist.lab.base import BaseSettings, build_with_progress, shipped_base
from sdft_dist.lab.teaching import RECIPE, SETS, fields_of, write_teaching_set
from sdft_dist.memory import PeakMemory
from sdft_dist.recipe import dump_config, load_config
from sdft_dist.report.report import report
from sdft_dist.runlog import read_metrics
from sdft_dist.session import ray_session
from sdft_dist.train import run

METHODS = ("sdft", "sft")
WORD, DOMAIN = "t35", "a"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one run measured."""

    method: str
    curve: list[dict[str, float]]  # accuracies by set, with `step`, from before the first step on
    train_seconds: float  # of the optimizer steps: generate, score, learn, push
    samples_per_s: float  # median over the steps
    pushed_mib: float  # to all engines before a step, median

    def old(self, point: dict[str, float]) -> float:
        """Mean accuracy on the old skills."""
        return statistics.mean(point[skill] for skill in world.OLD_SKILLS)


def unused_folder() -> Path:
    """runs/demo, or the first of runs/demo-2, runs/demo-3, … that is not there yet."""
    numbered = (Path(f"runs/demo-{n}") for n in itertools.count(2))
    return next(p for p in itertools.chain([Path("runs/demo")], numbered) if not p.exists())


def demo(out: Path | None, *, num_seeds: int, steps: int | None, rebuild_base: bool, overrides: Sequence[str]) -> None:
    """Run all, with `overrides` over the lab's recipe, and print the table; writes `curves.png`, `report/` and the
    runs into `out`, which must be unused."""
    console, out = Console(highlight=False), out or unused_folder()
    refuse_used(out)
    base = out / "base" if rebuild_base else shipped_base()
    fields = [*_sharing(), *overrides]
    configs = [
        (seed, method, lab_config(out, base, seed, method, steps, fields))
        for seed in range(num_seeds)
        for method in METHODS
    ]
    if rebuild_base:
        build_with_progress(BaseSettings(), base)
    console.print(
        f"The base model knows four skills on rows of five symbols: {', '.join(world.OLD_SKILLS)}. It is now taught "
        f"the new word {WORD} (to reverse symbols of domain {DOMAIN}), by SDFT and by SFT, from the same rows."
    )
    outcomes = []
    started = time.monotonic()
    with PeakMemory() as memory, ray_session(configs[0][2]):
        for seed, method, config in configs:
            run(config, title=f"{method.upper():4} seed {seed}", console=console, advice="")
            outcomes.append(measured(config))
    console.print(_table(outcomes, num_seeds))
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    console.print(
        f"{len(configs)} runs in {minutes} min {seconds} s with starting and evaluating, peak memory of all processes "
        f"{memory.gib:.1f} GiB."
    )
    picture = out / "curves.png"
    plot(outcomes, picture)
    page = report([Path(config.run_dir) for _, _, config in configs], out / "report")
    model = Path(configs[0][2].run_dir) / "model"
    console.print(
        f"Curves: {picture}\nReport: {page}\nTrained model (Hugging Face folder): {model}\n\n"
        f"Next: run one of them again with another setting, such as\n"
        f"  sdft train {out}/seed-0/sdft.yaml run_dir=runs/reverse loss.divergence=reverse_kl\n"
        f"or train your own model: see `sdft train --help` and deploy/recipes/.",
        soft_wrap=True,
    )


def _sharing() -> list[str]:
    """Where there are fewer GPUs than roles, all share one."""
    import torch

    return ["cluster.colocate=all"] if 0 < torch.cuda.device_count() < 3 else []


def lab_config(out: Path, base: Path, seed: int, method: str, steps: int | None, more: Sequence[str]) -> Config:
    """One run's configuration, also left as a recipe beside it."""
    data = out / f"seed-{seed}" / "data"
    fields = {
        "method": method,
        "run_dir": str(out / f"seed-{seed}" / method),
        "seed": seed,
        **fields_of(data, base),
        **({"steps": steps} if steps else {}),
    }
    config = load_config(RECIPE, [fields, *more])
    if not config.eval.every or not set(SETS).issubset(config.eval.sets):
        raise UserError(
            f"eval: the demo compares accuracies on its own sets, got eval.every={config.eval.every} and eval.sets "
            f"{', '.join(config.eval.sets) or 'without any'}: give an eval.every above 0, and leave eval.sets out"
        )
    if not data.exists():
        write_teaching_set(data, WORD, DOMAIN, seed, num_eval=150)
    (out / f"seed-{seed}" / f"{method}.yaml").write_text(dump_config(config))
    return config


def measured(config: Config) -> Outcome:
    """What a finished run of the lab came to."""
    folder = Path(config.run_dir)
    train = read_metrics(folder, "train")
    return Outcome(
        method=config.method,
        curve=read_metrics(folder, "eval"),
        train_seconds=sum(m["time/step"] for m in train),
        samples_per_s=statistics.median(m["samples_per_s"] for m in train),
        pushed_mib=statistics.median(m["pushed_mib"] for m in train),
    )


def _table(outcomes: list[Outcome], num_seeds: int) -> Table:
    seeds = "1 seed" if num_seeds == 1 else f"mean of {num_seeds} seeds"
    table = Table(
        padding=(0, 0), title=f"Accuracy after training, % ({seeds}, greedy, 150 held-out questions a column)"
    )
    columns = ("", f"new {WORD}", *world.OLD_SKILLS, "old mean", "train s", "samples/s", "pushed MiB")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    first = [o.curve[0] for o in outcomes]
    table.add_row("base", *_accuracies(outcomes, first), "", "", "")
    for method in METHODS:
        mine = [o for o in outcomes if o.method == method]
        table.add_row(
            method.upper(),
            *_accuracies(mine, [o.curve[-1] for o in mine]),
            f"{statistics.mean(o.train_seconds for o in mine):.0f}",
            f"{statistics.median(o.samples_per_s for o in mine):.0f}",
            f"{statistics.median(o.pushed_mib for o in mine):.2f}",
        )
    return table


def _accuracies(outcomes: list[Outcome], points: list[dict[str, float]]) -> list[str]:
    means = [statistics.mean(p[name] for p in points) for name in SETS]
    old = statistics.mean(o.old(p) for o, p in zip(outcomes, points, strict=True))
    return [f"{100 * value:.1f}" for value in (*means, old)]


def plot(outcomes: list[Outcome], path: Path) -> None:
    """Accuracy on the new word and on the old skills against steps; a thin line a seed, a thick mean."""
    from sdft_dist.report.charts import COLOURS, plt, save

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    colours = dict(zip(METHODS, COLOURS, strict=False))
    for axis, title in zip(axes, (f"new word: {WORD}", "old skills (mean of four)"), strict=True):
        for method in METHODS:
            mine = [o for o in outcomes if o.method == method]
            steps = [p["step"] for p in mine[0].curve]
            lines = [[100 * (p["new"] if title.startswith("new") else o.old(p)) for p in o.curve] for o in mine]
            for line in lines:
                axis.plot(steps, line, color=colours[method], alpha=0.3, linewidth=1)
            mean = [statistics.mean(values) for values in zip(*lines, strict=True)]
            axis.plot(steps, mean, color=colours[method], label=method.upper(), linewidth=2)
        axis.set(title=title, xlabel="optimizer steps", ylim=(-3, 103))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy, %")
    axes[1].legend(loc="lower left")
    save(figure, path)
