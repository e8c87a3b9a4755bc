"""`sdft status RUN`: how far a run is, from what it has written so far."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdft_dist.files import read_jsonl
from sdft_dist.recipe import load_config
from sdft_dist.rundir import RunDir

RECENT = 20  # steps that rates are medians of
LINES = 3  # of run.log


def status(path: Path) -> dict[str, Any]:
    """State, progress, rates and last evaluation of the run in `path`, while it is written to or after. Raises
    UserError where `path` is no run."""
    rundir = RunDir.open(path)
    # An attempt's settings hold its number of steps, also where the recipe gives epochs.
    numbered = (own for own in path.glob("attempts/*/config.yaml") if own.parent.name.isdecimal())
    attempts = sorted(numbered, key=lambda own: int(own.parent.name))
    config, owner = load_config(attempts[-1] if attempts else path / "config.yaml"), rundir.owner()
    records = read_jsonl(path / "metrics.jsonl")  # once, as it grows with every step
    train, evals = ([record for record in records if record["kind"] == kind] for kind in ("train", "eval"))
    recent, commits = train[-RECENT:], rundir.commits.steps()
    log = (path / "run.log").read_text().splitlines() if (path / "run.log").is_file() else []
    state = f"running ({owner})" if owner else "finished" if rundir.finished else "not running"
    found: dict[str, Any] = {
        "run": str(path),
        "method": config.method,
        "state": state,
        "step": train[-1]["step"] if train else 0,
        "checkpoints": commits,
        "log": log[-LINES:],
    }
    if recent:
        seconds = statistics.median(m["time/step"] for m in recent)
        found |= {"seconds_per_step": seconds, "samples_per_s": statistics.median(m["samples_per_s"] for m in recent)}
        found |= {name: recent[-1][name] for name in ("loss", "staleness_mean") if name in recent[-1]}
        if config.steps:
            found["steps"] = config.steps
        if config.steps and state != "finished":  # which may be before its last step, by eval.patience
            found["minutes_left"] = _pace(train) * (config.steps - found["step"]) / 60
    if evals:
        found["evaluation"] = {
            "step": evals[-1]["step"],
            **{n: evals[-1][n] for n in config.eval.sets if n in evals[-1]},
        }
    return found


def _pace(train: Sequence[dict[str, Any]]) -> float:
    """Seconds a step of the last attempt, evaluations and checkpoints between them counted in."""
    own = [record for record in train if record["attempt"] == train[-1]["attempt"]]
    if len(own) == 1:
        return float(own[0]["time/step"])
    return float(own[-1]["seconds"] - own[0]["seconds"]) / (len(own) - 1)


def accuracies(evaluation: dict[str, Any]) -> str:
    """The last evaluation that `status` tells, on one line."""
    sets = ", ".join(f"{name} {value:.1%}" for name, value in evaluation.items() if name != "step")
    return f"{sets} (step {evaluation['step']})"


def show(found: dict[str, Any]) -> str:
    """The same as lines of text."""
    plain = {name: value for name, value in found.items() if name not in ("log", "evaluation")}
    lines = [
        f"{name.replace('_', ' '):18}{f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in plain.items()
    ]
    if "evaluation" in found:
        lines.append(f"{'evaluation':18}{accuracies(found['evaluation'])}")
    return "\n".join([*lines, *(f"  {line}" for line in found["log"])])
