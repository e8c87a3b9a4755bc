"""`sdft sweep status | report`: what each trial learned, kept and cost, from what the trials have written."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_dist.files import read_jsonl
from sdft_dist.recipe import load_config
from sdft_dist.selection import exported
from sdft_dist.sweep.space import Sweep
from sdft_dist.sweep.trials import Trial, trials
from sdft_dist.topology import needs, num_gpus

Row = dict[str, Any]


def rows(sweep: Sweep) -> list[Row]:
    """One for each trial: its settings, `state`, `step`, `new` and `retained` (accuracies 0 to 1, of the weights that
    it exports, or the last so far; None before the first evaluation, and where it diverged) and `gpu_hours` (CPU runs:
    `hours`)."""
    return [_row(sweep, trial) for trial in trials(sweep)]


def _row(sweep: Sweep, trial: Trial) -> Row:
    config = trial.config
    records = trial.records()
    state, last = trial.state, records[-1] if records else None
    record = {"finished": exported(config.eval, records), "diverged": None}.get(state, last)
    new = sweep.new or next(iter(config.eval.sets))
    others = [name for name in config.eval.sets if name != new]
    gpus = num_gpus(needs(config, _device(trial)))
    hours = _hours(trial.run)
    return {
        "trial": trial.name,
        "method": trial.method,
        **{f"set/{field}": value for field, value in trial.values.items()},
        "state": state,
        "step": (record or last or {"step": 0})["step"],
        "new": record[new] if record else None,
        "retained": statistics.mean(record[name] for name in others) if record and others else None,
        **({"gpu_hours": gpus * hours} if gpus else {"hours": hours}),
    }


def _device(trial: Trial) -> str:
    """What it ran on: a trial is told when it starts."""
    path = trial.run / "config.yaml"
    return load_config(path).cluster.device if path.is_file() else trial.config.cluster.device


def _hours(run: Path) -> float:
    """Wall clock of all attempts of a run, from each one's start to the last of it that counts."""
    ends: dict[int, float] = {}
    for record in read_jsonl(run / "metrics.jsonl"):
        attempt = record.get("attempt", 1)  # records of runs from before attempts were numbered
        ends[attempt] = max(ends.get(attempt, 0.0), record["seconds"])
    return sum(ends.values()) / 3600


def front(found: Sequence[Row]) -> list[Row]:
    """The trials that no other one beats in both what was learned and what was kept."""
    judged = [row for row in found if _is_judged(row)]
    return [
        row
        for row in judged
        if not any(
            (other["new"], other["retained"]) != (row["new"], row["retained"])
            and other["new"] >= row["new"]
            and other["retained"] >= row["retained"]
            for other in judged
        )
    ]


def markdown(found: Sequence[Row]) -> str:
    """A table, the best mean of new and retained first; trials of the front in bold."""
    best = {row["trial"] for row in front(found)}
    fields = list(dict.fromkeys(key for row in found for key in row if key.startswith("set/")))
    cost = "gpu_hours" if any("gpu_hours" in row for row in found) else "hours"
    heads = ["trial", *(field.removeprefix("set/") for field in fields), "state", "steps", "new, %", "retained, %"]
    lines = [
        f"| {' | '.join([*heads, cost.replace('_', '-').replace('gpu', 'GPU')])} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for row in sorted(found, key=lambda row: -((row["new"] or 0.0) + (row["retained"] or 0.0))):
        name = f"**{row['trial']}**" if row["trial"] in best else row["trial"]
        shown = ["" if row[key] is None else f"{100 * row[key]:.1f}" for key in ("new", "retained")]
        cells = [name, *(str(row.get(field, "")) for field in fields), row["state"], str(row["step"]), *shown]
        lines.append(f"| {' | '.join([*cells, f'{row.get(cost, 0.0):.3f}'])} |")
    return "\n".join(lines) + "\n"


def write_report(sweep: Sweep) -> Path:
    """Write `results.json`, `table.md` and `pareto.png` into the sweep's folder; returns it."""
    from sdft_dist.report import charts

    out, found = Path(sweep.out), rows(sweep)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(found, indent=1))
    (out / "table.md").write_text(markdown(found))
    methods = {row["method"]: [own for own in found if own["method"] == row["method"]] for row in found}
    judged = {name: [_percent(row) for row in own if _is_judged(row)] for name, own in methods.items()}
    points = {name: own for name, own in judged.items() if own}
    best = {name: [_percent(row) for row in front(own)] for name, own in methods.items()}
    charts.save(charts.front(points, best), out / "pareto.png")
    return out


def _is_judged(row: Row) -> bool:
    return row["new"] is not None and row["retained"] is not None


def _percent(row: Mapping[str, Any]) -> tuple[float, float]:
    return 100 * row["retained"], 100 * row["new"]
