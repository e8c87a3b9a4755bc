"""`sdft report RUN…`: one page that holds everything, and its pictures as PNG files beside it.

Two or more runs are compared; fields in which their settings differ come first.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from sdft_dist.config import Config
from sdft_dist.errors import UserError
from sdft_dist.evaluate import Judged
from sdft_dist.files import read_jsonl, refuse_used
from sdft_dist.recipe import dump_config, flat, load_config
from sdft_dist.report.charts import Curve, Point, curves, matrix, pareto, shares
from sdft_dist.report.page import page, picture, side_by_side, table, text_cell
from sdft_dist.rundir import RunDir
from sdft_dist.selection import exported

ROWS = 4  # shown of each set


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run directory tells."""

    name: str
    path: Path
    config: Config
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    judged: list[dict[str, list[Judged]]]  # held-out rows at the first and the last evaluation, if there are any

    @property
    def sets(self) -> list[str]:
        """Names of the held-out sets."""
        return list(self.config.eval.sets) if self.evals else []

    @property
    def resumed(self) -> list[int]:
        """The steps after which another attempt went on."""
        pairs = pairwise(self.train)
        return [before["step"] for before, after in pairs if before.get("attempt") != after.get("attempt")]


def report(paths: Sequence[Path], out: Path, new: str | None = None) -> Path:
    """Write `out`/index.html about the runs in `paths`. `new` names the held-out set of what is taught, the
    first one unless it is given. Raises UserError where a folder is no run or holds a damaged file, or `out` is in
    use."""
    refuse_used(out)
    runs = _read(paths)
    names = list(dict.fromkeys(name for run in runs for name in run.sets))
    if new is not None and new not in names:
        raise UserError(
            f"--new: got {new!r}, expected one of the held-out sets: {', '.join(names) or 'there are none'}"
        )
    new = new or (names[0] if names else None)
    out.mkdir(parents=True, exist_ok=True)
    parts = [
        f"<h1>{escape(' · '.join(run.name for run in runs))}</h1>",
        _overview(runs),
        *_accuracy(runs, new, out),
        *(_retention(chain, out) for chain in _chains(runs)),
        *_training(runs, out),
        *_positions(runs, out),
        *_time(runs, out),
        *(_rows(run, new) for run in runs if run.evals),
        *(_samples(run) for run in runs),
        _settings(runs),
    ]
    (out / "index.html").write_text(page(", ".join(run.name for run in runs), parts))
    return out / "index.html"


def _read(paths: Sequence[Path]) -> list[Run]:
    runs = []
    paths = list({path.resolve(): path for path in paths}.values())  # each once
    for name, path in zip(_names([path.resolve() for path in paths]), paths, strict=True):
        rundir = RunDir.open(path)
        if not (path / "metrics.jsonl").is_file():
            raise UserError(f"{path}: has no metrics.jsonl: nothing was trained yet")
        records = read_jsonl(path / "metrics.jsonl")
        evals = [record for record in records if record["kind"] == "eval"]
        runs.append(
            Run(
                name=name,
                path=path,
                config=load_config(path / "config.yaml"),
                train=[record for record in records if record["kind"] == "train"],
                evals=evals,
                judged=[rundir.evaluation(evals[i]["step"]) for i in (0, -1)] if evals else [],
            )
        )
    return runs


def _names(folders: Sequence[Path]) -> list[str]:
    """A name for each of these absolute paths, which all differ: its last part, or as many parts as tell it from the
    others."""
    names, depth = [folder.name for folder in folders], 1
    while len(set(names)) < len(names):
        depth += 1
        names = [
            str(Path(*folder.parts[-depth:])) if names.count(name) > 1 else name
            for folder, name in zip(folders, names, strict=True)
        ]
    return names


def _overview(runs: Sequence[Run]) -> str:
    head = ["run", "method", "model", "steps", "resumed after", "samples", "samples/s", "minutes"]
    rows = [
        [
            run.name,
            run.config.method,
            "/".join(Path(run.config.model.path).parts[-2:]),  # a hub id whole; of many folders the last is "model"
            str(len(run.train)),
            ", ".join(map(str, run.resumed)),
            str(sum(m["samples"] for m in run.train)),
            f"{statistics.median(m['samples_per_s'] for m in run.train):.1f}" if run.train else "",
            f"{sum(m['time/step'] for m in run.train) / 60:.1f}",
        ]
        for run in runs
    ]
    return table(head, rows, numbers=range(3, len(head)))


def _accuracy(runs: Sequence[Run], new: str | None, out: Path) -> list[str]:
    judged = [run for run in runs if run.evals]
    if not judged or new is None:
        return ["<h2>Accuracy</h2><p class=soft>None was measured: give eval.every and eval.sets.</p>"]
    names = list(dict.fromkeys(name for run in judged for name in run.sets))
    others = [name for name in names if name != new]
    shared = [name for name in others if all(name in record for run in judged for record in run.evals)]
    head = ["run", "step", *names, *(["others, mean"] if shared else [])]
    rows = []
    for run in judged:
        for record in {e["step"]: e for e in (run.evals[0], run.evals[-1])}.values():
            cells = [_percent(record, name) for name in names]
            mean = [f"{100 * _mean(record, shared):.1f}%"] if shared else []
            rows.append([run.name, str(record["step"]), *cells, *mean])
    notes = [
        f"Greedy, scored by {judged[0].config.eval.scorer}; 95% intervals by Wilson's score.",
        f"The set of what is taught: {new}.",
        f"Others, mean: of {', '.join(shared)}." if shared else "",
        _left_out("the mean", "not in every evaluation of all runs", set(others) - set(shared)),
        _left_out(
            "the picture of what was learned against what was kept",
            f"{new} was not measured at their start and end",
            {run.name for run in judged if shared and not _spans(run, new)},
        ),
    ]
    return [
        "<h2>What was learned, what was kept</h2>",
        f"<p class=soft>{escape(' '.join(filter(None, notes)))}</p>",
        table(head, rows, numbers=range(1, len(head))),
        side_by_side(_learned_and_kept(judged, new, shared, out)),
    ]


def _learned_and_kept(judged: Sequence[Run], new: str, shared: Sequence[str], out: Path) -> list[str]:
    """Pictures of the accuracy on what is taught and of the mean over `shared`, which all evaluations have."""
    found = {run.name: _with_interval(run, new) for run in judged if any(new in record for record in run.evals)}
    pictures = [_curves(new, found, "accuracy, %", out, percent=True)]
    arrows = {
        run.name: Point(*((100 * _mean(run.evals[i], shared), 100 * run.evals[i][new]) for i in (0, -1)))
        for run in judged
        if shared and _spans(run, new)
    }
    if arrows:
        pictures.insert(0, picture(pareto(arrows, new), "pareto", "What was learned against what was kept", out))
    if shared:
        means = {
            run.name: Curve([e["step"] for e in run.evals], [100 * _mean(e, shared) for e in run.evals])
            for run in judged
        }
        pictures.append(_curves("others, mean", means, "accuracy, %", out, percent=True))
    return pictures


def _spans(run: Run, name: str) -> bool:
    """Whether a set was measured at the run's start and at its end."""
    return name in run.evals[0] and name in run.evals[-1]


def _left_out(where: str, why: str, names: Collection[str]) -> str:
    return f"Left out of {where}, as {why}: {', '.join(sorted(names))}." if names else ""


def _chains(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that go on from each other's model, in order; only where there are at least two."""
    exported = {(run.path / "model").resolve(): run for run in runs}
    before = {run.name: exported.get(Path(run.config.model.path).resolve()) for run in runs}
    chains = []
    for last in runs:
        if last.name in {parent.name for parent in before.values() if parent is not None}:
            continue
        chain = [last]
        while (parent := before[chain[0].name]) is not None:
            chain.insert(0, parent)
        if len(chain) > 1 and all(run.evals for run in chain):
            chains.append(chain)
    return chains


def _retention(chain: Sequence[Run], out: Path) -> str:
    """Accuracy on every set at the start and after every run of a chain."""
    rows = {"start": chain[0].evals[0], **{run.name: exported(run.config.eval, run.evals) or {} for run in chain}}
    names = [name for name in chain[0].sets if all(name in record for record in rows.values())]
    left_out = _left_out(
        "the picture", "not measured at the start and after every run", set(chain[0].sets) - set(names)
    )
    text = f"{' → '.join(run.name for run in chain)}: accuracy, %. {left_out}".strip()
    drawn = ""
    if names:
        figure = matrix({row: [100 * record[name] for name in names] for row, record in rows.items()}, names)
        title = f"retention-{chain[-1].name}".replace("/", "-")
        drawn = picture(figure, title, "Accuracy on every set after every stage", out)
    return f"<h2>What each stage kept</h2><p class=soft>{escape(text)}</p>{drawn}"


def _training(runs: Sequence[Run], out: Path) -> list[str]:
    trained = [run for run in runs if run.train]
    if not trained:
        return []
    pictures = []
    for title, field, unit in (
        ("loss", "loss", "nats"),
        ("gradient norm", "grad_norm", ""),
        ("completion length", "completion_tokens_mean", "tokens, mean"),
    ):
        found = {
            run.name: Curve([m["step"] for m in run.train], [m[field] for m in run.train], marks=run.resumed)
            for run in trained
        }
        pictures.append(_curves(title, found, unit, out))
    notes = []
    if len({run.config.method for run in trained}) > 1:
        notes.append(
            "Losses of different methods are different measures: SDFT's is a divergence from its teacher, SFT's and "
            "DFT's are cross-entropies on demonstrations."
        )
    if any(run.resumed for run in trained):
        notes.append("Dotted: where a run was interrupted and went on.")
    note = f"<p class=soft>{' '.join(notes)}</p>" if notes else ""
    return ["<h2>Training</h2>", note, side_by_side(pictures)]


def _positions(runs: Sequence[Run], out: Path) -> list[str]:
    """The divergence of the first positions and, after those, tenths of the completion."""
    pictures = []
    for run in runs:
        # Of a step that was skipped, as its loss was no finite number, there is None at all positions.
        known = [m for m in run.train if any(value is not None for value in m.get("divergence_by_position") or ())]
        if run.config.method == "sdft" and known:
            chosen = {m["step"]: m for m in (known[0], known[len(known) // 2], known[-1])}
            found = {}
            for step, m in chosen.items():
                points = [(i, value) for i, value in enumerate(m["divergence_by_position"]) if value is not None]
                found[f"step {step}"] = Curve(*zip(*points, strict=True))
            title = f"divergence by position, {run.name}"
            pictures.append(_curves(title, found, "nats", out, "position: first tokens, then tenths of the rest"))
    return ["<h2>Divergence by position</h2>", side_by_side(pictures)] if pictures else []


def _time(runs: Sequence[Run], out: Path) -> list[str]:
    busy = {}
    for run in runs:
        wall = sum(m["time/step"] for m in run.train)
        what = {name for m in run.train for name in m if name.startswith("busy/")}
        if wall and what:
            busy[run.name] = {w.removeprefix("busy/"): sum(m.get(w, 0.0) for m in run.train) / wall for w in what}
    if not busy:
        return []
    return ["<h2>Where the time went</h2>", picture(shares(busy), "time", "Share of the wall clock", out)]


def _rows(run: Run, new: str | None) -> str:
    """Held-out rows at the first and the last evaluation; of each set, those whose verdict changed first."""
    first, last = run.judged
    cells = []
    for name in sorted(last, key=lambda n: (n != new, n)):
        before = first.get(name, [])
        if len(before) != len(last[name]):  # other rows: the set was changed on the way
            before = last[name]
        pairs = zip(before, last[name], strict=True)
        for old, row in sorted(pairs, key=lambda pair: pair[0].right == pair[1].right)[:ROWS]:
            texts = (row.prompt, row.answer, old.completion, row.completion)
            marks = ("", "", *("right" if one.right else "wrong" for one in (old, row)))
            tds = "".join(text_cell(text, mark) for text, mark in zip(texts, marks, strict=True))
            cells.append(f"<tr><td>{escape(name)}</td>{tds}</tr>")
    if not cells:
        return ""
    steps = (run.evals[0]["step"], run.evals[-1]["step"])
    head = "".join(f"<th>{h}</th>" for h in ("set", "question", "answer", f"step {steps[0]}", f"step {steps[1]}"))
    return (
        f"<h2>Held-out rows, {escape(run.name)}</h2><p class=soft>Green is right, red is wrong; rows whose verdict "
        f"changed come first.</p><div class=wide><table><tr>{head}</tr>{''.join(cells)}</table></div>"
    )


def _samples(run: Run) -> str:
    """What the student sampled at the first step and at the last that was written down, beside the demonstration."""
    files = RunDir(run.path).files_of_steps("samples")
    lines = [
        [f"{step}", row["prompt"], row["demonstration"], row["completion"]]
        for step, path in dict([*files[:1], *files[-1:]]).items()
        for row in read_jsonl(path)[:ROWS]
    ]
    if not lines:
        return ""
    said = (
        "What the student sampled from the prompt alone, and what its teacher was shown besides. All of them: samples/."
    )
    head = ["step", "prompt", "demonstration", "sampled"]
    return f"<h2>Samples, {escape(run.name)}</h2><p class=soft>{said}</p>{table(head, lines, texts=range(1, 4))}"


def _settings(runs: Sequence[Run]) -> str:
    fields = [flat(run.config) for run in runs]
    differing = [key for key in fields[0] if len({json.dumps(f.get(key)) for f in fields}) > 1]
    parts = ["<h2>Settings</h2>"]
    if len(runs) > 1:
        rows = [[key, *(json.dumps(f.get(key)) for f in fields)] for key in differing]
        parts.append(table(["differs", *(run.name for run in runs)], rows))
    for run in runs:
        parts.append(
            f"<details><summary>{escape(run.name)}, all settings</summary><pre>{escape(dump_config(run.config))}</pre>"
            "</details>"
        )
    return "\n".join(parts)


def _with_interval(run: Run, name: str) -> Curve:
    known = [e for e in run.evals if name in e]
    spread = [e.get(f"{name}_interval", (e[name], e[name])) for e in known]
    return Curve(
        [e["step"] for e in known],
        [100 * e[name] for e in known],
        [100 * low for low, _ in spread],
        [100 * high for _, high in spread],
    )


def _percent(record: Mapping[str, Any], name: str) -> str:
    if name not in record:
        return ""
    shown = f"{100 * record[name]:.1f}%"
    spread = record.get(f"{name}_interval")
    return shown if spread is None else f"{shown} ({100 * spread[0]:.0f} – {100 * spread[1]:.0f})"


def _mean(record: Mapping[str, Any], names: Sequence[str]) -> float:
    return statistics.mean(record[name] for name in names)


def _curves(
    title: str,
    runs: Mapping[str, Curve],
    ylabel: str,
    out: Path,
    xlabel: str = "optimizer steps",
    *,
    percent: bool = False,
) -> str:
    name = "".join(c if c.isalnum() else "-" for c in title.lower())
    return picture(curves(title, runs, xlabel, ylabel, percent=percent), name, f"{title} against {xlabel}", out)
