"""What a plan of tasks in sequence has shown: results.json, table.md and pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from sdft_dist.continual.retention import normalised, retention
from sdft_dist.evaluate import Judged, accuracy, wilson
from sdft_dist.recipe import load_config
from sdft_dist.report import charts
from sdft_dist.report.charts import Curve
from sdft_dist.rundir import RunDir
from sdft_dist.runlog import read_metrics
from sdft_dist.selection import exported

PRIOR = "prior"  # column of the mean over all prior sets
Sequences = Mapping[str, Mapping[int, Sequence[Path]]]  # by method and seed: its stages' run directories, in order
Records = list[list[dict[str, Any]]]  # evaluations of each stage of one sequence


def write_results(out: Path, tasks: Sequence[str], prior: Sequence[str], sequences: Sequences) -> dict[str, Any]:
    """Writes results.json, table.md, curves.png and normalised.png into `out` and returns what is in the first."""
    found = results(tasks, prior, sequences)
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "table.md").write_text(markdown(found))
    _pictures(out, tasks, prior, sequences)
    return found


def results(tasks: Sequence[str], prior: Sequence[str], sequences: Sequences) -> dict[str, Any]:
    """For each method: how many held-out rows of every set are right at the start and after every stage, a number
    for each seed, and what `retention` measures for each seed."""
    names = (*tasks, *prior)
    found: dict[str, Any] = {"tasks": [*tasks], "prior": [*prior], "methods": {}}
    for method, seeds in sequences.items():
        by_seed = [[RunDir(runs[0]).evaluation(0), *map(_end, runs)] for runs in seeds.values()]
        accuracies = [[{name: accuracy(stage[name]) for name in names} for stage in own] for own in by_seed]
        found["rows"] = {name: len(by_seed[0][0][name]) for name in names}
        found["methods"][method] = {
            "seeds": [*seeds],
            "right": [
                {name: [sum(row.right for row in own[i][name]) for own in by_seed] for name in names}
                for i in range(1 + len(tasks))
            ],
            "measures": [retention(tasks, prior, own) for own in accuracies],
        }
    return found


def _end(run: Path) -> dict[str, list[Judged]]:
    """The held-out rows as the model judged them that the next stage starts from."""
    record = exported(load_config(run / "config.yaml").eval, read_metrics(run, "eval"))
    assert record is not None, "every stage is evaluated at its end"
    return RunDir(run).evaluation(record["step"])


def markdown(found: Mapping[str, Any]) -> str:
    """The results as two tables: accuracy after each stage, and the measures."""
    tasks, prior = found["tasks"], found["prior"]
    columns = {name: [name] for name in (*tasks, *prior)} | ({PRIOR: prior} if prior else {})
    counts = ", ".join(f"{sum(found['rows'][name] for name in names)} {head}" for head, names in columns.items())
    note = f"{PRIOR}: mean of its {len(prior)} sets. " if prior else ""
    lines = [
        "Accuracy, %: mean over seeds (95% interval by Wilson's score of that mean for the questions, which all seeds "
        f"share; lowest seed). {note}Held-out questions: {counts}.",
        "",
        f"| method | after | {' | '.join(columns)} |",
        "|---|---|" + "---|" * len(columns),
    ]
    for method, own in found["methods"].items():
        for i, right in enumerate(own["right"]):
            cells = [_cell(found["rows"], right, names) for names in columns.values()]
            lines.append(f"| {method} | {tasks[i - 1] if i else 'start'} | {' | '.join(cells)} |")
    measured = [m for own in found["methods"].values() for m in own["measures"]]
    heads = [head for head in measured[0] if any(m[head] is not None for m in measured)]
    lines += ["", "Mean over seeds (lowest – highest), %.", "", f"| method | {' | '.join(heads)} |"]
    lines.append("|---|" + "---|" * len(heads))
    for method, own in found["methods"].items():
        lines.append(f"| {method} | {' | '.join(_spread([m[head] for m in own['measures']]) for head in heads)} |")
    return "\n".join(lines) + "\n"


def _cell(rows: Mapping[str, int], right: Mapping[str, list[int]], names: Sequence[str]) -> str:
    """Accuracy as the mean over the sets `names`, in percent: mean over seeds, its interval, the lowest seed's.

    All seeds answer the same questions, so that a further seed adds no question: the interval is that of the mean
    for the distinct questions, once. What it leaves out, how seeds differ, the lowest seed tells."""
    per_seed = [
        statistics.mean(seed) for seed in zip(*([n / rows[name] for n in right[name]] for name in names), strict=True)
    ]
    mean, asked = statistics.mean(per_seed), questions(rows[name] for name in names)
    low, high = wilson(mean * asked, asked)
    lowest = f"; {100 * min(per_seed):.1f}" if len(per_seed) > 1 else ""
    return f"{100 * mean:.1f} ({100 * low:.1f} – {100 * high:.1f}{lowest})"


def questions(sizes: Iterable[int]) -> int:
    """How many questions of one set tell as much as the mean over sets of these sizes, each of which counts the same:
    k² / Σ 1/n of k sets, by the variance of a mean of shares. It is their sum where they are equally large."""
    sizes = list(sizes)
    return round(len(sizes) * statistics.harmonic_mean(sizes))


def _spread(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ({min(known):.1f} – {max(known):.1f})" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}"


def _pictures(out: Path, tasks: Sequence[str], prior: Sequence[str], sequences: Sequences) -> None:
    """Accuracy against optimizer steps, as it is and on a scale where 0 is the start and 100 the best that any
    method reached."""
    lines = {task: [task] for task in tasks} | ({PRIOR: list(prior)} if prior else {})
    panels: dict[str, dict[str, list[Curve]]] = {}
    ends: dict[str, list[int]] = {}
    for method, seeds in sequences.items():
        records = [[read_metrics(run, "eval") for run in runs] for runs in seeds.values()]
        ends[method] = _ends(records)
        panels[method] = {name: [_curve(own, sets, ends[method]) for own in records] for name, sets in lines.items()}
    scaled = {
        method: {name: [_scaled(curve, _range(panels, name)) for curve in own] for name, own in panel.items()}
        for method, panel in panels.items()
    }
    for name, what, ylabel in (
        ("curves", panels, "accuracy, %"),
        ("normalised", scaled, "accuracy, % of\nthe way from\nstart to best"),
    ):
        charts.save(charts.sequences(what, ends, list(tasks), ylabel), out / f"{name}.png")


def _ends(seeds: Sequence[Records]) -> list[int]:
    """The optimizer steps done after each stage, counted from the first on. A stage is as long as with the seed that
    took longest: others may have stopped early."""
    return list(accumulate(max(stage[-1]["step"] for stage in same) for same in zip(*seeds, strict=True)))


def _curve(records: Records, sets: Sequence[str], ends: Sequence[int]) -> Curve:
    """Mean accuracy over `sets`, %, over all stages of one sequence, which end at `ends`."""
    starts = [0, *ends]
    points = [(start + r["step"], r) for start, stage in zip(starts, records, strict=False) for r in stage]
    return Curve([x for x, _ in points], [100 * statistics.mean(r[name] for name in sets) for _, r in points])


def _range(panels: Mapping[str, Mapping[str, Sequence[Curve]]], name: str) -> tuple[float, float]:
    curves = [curve for panel in panels.values() for curve in panel[name]]
    return curves[0].y[0], max(y for curve in curves for y in curve.y)


def _scaled(curve: Curve, ends: tuple[float, float]) -> Curve:
    """Empty where no method got better than the start."""
    points = [(x, normalised(y, *ends)) for x, y in zip(curve.x, curve.y, strict=True)]
    known = [(x, 100 * y) for x, y in points if y is not None]
    return Curve([x for x, _ in known], [y for _, y in known])
