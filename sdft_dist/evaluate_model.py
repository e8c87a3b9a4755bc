"""`sdft eval`: accuracy of a model folder on the held-out sets of a recipe, without any training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sdft_dist.cluster import serving
from sdft_dist.config import Config
from sdft_dist.errors import ConfigError
from sdft_dist.evaluate import Judged, accuracy, evaluate, interval, load_eval_sets, load_scorer, pass_at, summary
from sdft_dist.files import refuse_used
from sdft_dist.judge import Judge
from sdft_dist.prepare import check_device
from sdft_dist.prompts import load_tokenizer, stop_ids, vocab_size
from sdft_dist.rundir import write_evaluation
from sdft_dist.session import ray_session


def evaluate_model(config: Config, out: Path | None = None) -> tuple[dict[str, Any], dict[str, list[Judged]]]:
    """What `evaluate.summary` tells of `model.path`, its number of rows as NAME_rows, with the model and the scorer;
    and every row. Into `out`, where one is given, go `results.json` and `rows.jsonl`. Raises UserError where settings,
    rows or model are wrong, or `out` is in use; Fault where generators are lost."""
    if out is not None:
        refuse_used(out)
    if not config.eval.sets:
        raise ConfigError("eval.sets: has no held-out file to evaluate on: give eval.sets.NAME=FILE")
    check_device(config)
    tokenizer = load_tokenizer(config)
    sets, scorer, ends = load_eval_sets(config, tokenizer), load_scorer(config.eval), stop_ids(tokenizer, config.model)
    with ray_session(config), serving(config, ends, vocab_size(tokenizer)) as engines:
        _, limit = config.evaluation_limit
        judged = evaluate(sets, engines, tokenizer, scorer, limit, config.eval.samples)
    found = {
        "model": config.model.path,
        "revision": config.model.revision,
        "scorer": config.eval.scorer,
        "max_completion_tokens": limit,
        **{f"{name}_rows": len(rows) for name, rows in judged.items()},
        **summary(judged),
        **(scorer.cost() if isinstance(scorer, Judge) else {}),
    }
    if out is not None:
        write_evaluation(out / "rows.jsonl", judged)
        (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    return found, judged


def show(found: Mapping[str, Any], judged: Mapping[str, Sequence[Judged]], console: Console) -> None:
    """Accuracies as a table."""
    ks = sorted({k for rows in judged.values() for k in pass_at(rows)})
    table = Table(title=f"{found['model']}, scored by {found['scorer']}, greedy")
    for column in ("set", "rows", "accuracy", "95% interval", "cut", *(f"pass@{k}" for k in ks)):
        table.add_column(column, justify="left" if column == "set" else "right")
    for name, rows in judged.items():
        low, high = interval(rows)
        passes = [f"{100 * share:.1f}%" for share in pass_at(rows).values()]
        spread, cut = f"{100 * low:.1f} – {100 * high:.1f}", f"{100 * found[f'{name}_cut_share']:.0f}%"
        table.add_row(name, str(len(rows)), f"{100 * accuracy(rows):.1f}%", spread, cut, *passes)
    console.print(table)
